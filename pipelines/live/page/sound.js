// An audio file → its samples, the mean of its channels, at its own rate where that can be told.

export const PIECE = 0.1; // seconds of sound that are heard at once
const OTHERS = 48000; // rate at which the browser decodes what does not tell its own: above all that networks hear

/** Bytes of a file → { samples, rate }; an Error when the browser cannot decode it. */
export async function decode(bytes) {
  const view = new DataView(bytes), said = headerOf(view);
  if (said.pcm16) return { samples: samplesOf(view, said), rate: said.rate };
  let context;
  try {
    context = new OfflineAudioContext(1, 1, said.rate);
  } catch {
    context = new OfflineAudioContext(1, 1, OTHERS); // a rate that this browser does not have
  }
  const decoded = await context.decodeAudioData(bytes);
  const samples = new Float32Array(decoded.length);
  for (let channel = 0; channel < decoded.numberOfChannels; channel++)
    decoded.getChannelData(channel).forEach((one, at) => { samples[at] += one / decoded.numberOfChannels; });
  return { samples, rate: decoded.sampleRate };
}

/** What WAV and FLAC say of themselves. */
function headerOf(view) {
  const name = (at) => (at + 4 > view.byteLength ? "" : String.fromCharCode(...new Uint8Array(view.buffer, at, 4)));
  if (name(0) === "fLaC" && view.byteLength > 21) return { rate: (view.getUint32(18) >>> 12) || OTHERS };
  if (name(0) !== "RIFF" || name(8) !== "WAVE") return { rate: OTHERS };
  let said = { rate: OTHERS };
  for (let at = 12; at + 8 <= view.byteLength; ) {
    const size = view.getUint32(at + 4, true), inside = at + 8;
    if (name(at) === "fmt " && inside + 16 <= view.byteLength) {
      const [kind, channels, bits] = [0, 2, 14].map((offset) => view.getUint16(inside + offset, true));
      said = { rate: view.getUint32(inside + 4, true), channels, whole: kind === 1 && bits === 16 && channels > 0 };
    }
    if (name(at) === "data") return { ...said, pcm16: said.whole, from: inside, to: Math.min(inside + size, view.byteLength) };
    at = inside + size + (size % 2);
  }
  return said;
}

/** Samples of 16 bits as the training hears them: browsers differ in what they divide by. */
function samplesOf(view, { channels, from, to }) {
  const samples = new Float32Array(Math.floor((to - from) / (2 * channels)));
  for (let at = 0; at < samples.length; at++) {
    let sum = 0;
    for (let channel = 0; channel < channels; channel++) sum += view.getInt16(from + 2 * (at * channels + channel), true);
    samples[at] = sum / (32768 * channels);
  }
  return samples;
}
