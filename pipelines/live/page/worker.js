// The network, beside the page so that it never stalls. Messages in: { load }, { hear }, { stop }; out: { loaded }, { heard }, { done } or { failed }.
import * as ort from "./onnxruntime/ort.wasm.bundle.min.mjs";
import { Resampler } from "./resample.js";
import { PIECE } from "./sound.js";
import { Words } from "./words.js";

ort.env.wasm.numThreads = 1; // more would need headers that a plain file server does not send
ort.env.logLevel = "error";

const RUNTIME = "onnxruntime/ort-wasm-simd-threaded.wasm";
let session, about, tokens, stop = () => {};

addEventListener("message", async ({ data }) => {
  try {
    if (data.load) await load(data.load);
    if (data.hear) await hear(data.hear);
    if (data.stop) stop();
  } catch (error) {
    postMessage({ failed: error.message });
  }
});

async function load(wanted) {
  ort.env.wasm.wasmBinary ??= await bytesOf(RUNTIME, "default");
  const graph = await bytesOf(wanted.path, "no-cache"); // a page that was built again is of one network, not of two
  const made = await ort.InferenceSession.create(graph).catch((error) => {
    throw new Error(error.message.replace(/.*ERROR_MESSAGE: /s, "").replace(/\.+$/, ""));
  });
  await session?.release();
  [session, about, tokens] = [made, wanted.about, wanted.tokens];
  await answers(new Float32Array(about.features.sample_rate), fresh(), 0); // a first call takes longer
  postMessage({ loaded: true });
}

/** A file beside this one. */
async function bytesOf(path, cache) {
  const answer = await fetch(new URL(path, import.meta.url), { cache });
  if (!answer.ok) throw new Error(`the server answers ${answer.status} for ${path}`);
  return new Uint8Array(await answer.arrayBuffer());
}

/** What the network answers to the next samples. */
const answers = (samples, state, end) =>
  session.run({ samples: new ort.Tensor("float32", samples, [1, samples.length]), state, end: new ort.Tensor("float32", [end], [1]) });

/** The state before a recording. */
const fresh = () => new ort.Tensor("float32", new Float32Array(about.state), [1, about.state]);

/** Hear a recording: `samples` of a file, or what comes through a `port`; its rate in Hz. */
async function hear({ samples, port, rate }) {
  const resampler = new Resampler(rate, about.features.sample_rate);
  const words = new Words(tokens, about.frame_ms / 1000);
  let state = fresh(), heard = 0, spent = 0;

  async function push(sound, arrived, end) {
    const began = performance.now(), waited = Math.max(0, Date.now() - arrived);
    heard += sound.length / rate;
    const said = await answers(end ? resampler.finish() : resampler.push(sound), state, end);
    state = said.next_state;
    const piece = { heard, computing: 0 };
    const found = words.push(said.log_probs.data, said.frames.data[0], piece, end);
    const seconds = (performance.now() - began) / 1000;
    spent += seconds;
    piece.computing = waited / 1000 + seconds;
    postMessage({ heard: { ...found, seconds: heard, spent, peak: sound.reduce((most, one) => Math.max(most, Math.abs(one)), 0) } });
  }

  for await (const { samples: sound, arrived } of port ? arriving(port) : cut(samples, rate)) await push(sound, arrived, 0);
  await push(new Float32Array(0), Date.now(), 1);
  postMessage({ done: true });
}

/** Pieces as the worklet sends them. */
async function* arriving(port) {
  const waiting = [];
  let wake = () => {};
  port.onmessage = ({ data }) => wake(waiting.push(data));
  stop = () => port.onmessage({ data: { end: true } });
  for (;;) {
    while (!waiting.length) await new Promise((done) => { wake = done; });
    const piece = waiting.shift();
    if (piece.end) return;
    yield piece;
  }
}

/** Pieces of a file, as fast as they are heard; a stop is noticed in between. */
async function* cut(samples, rate) {
  const step = Math.max(1, Math.round(rate * PIECE));
  let stopped = false, last = performance.now();
  stop = () => { stopped = true; };
  for (let at = 0; at < samples.length && !stopped; at += step) {
    yield { samples: samples.subarray(at, at + step), arrived: Date.now() };
    if (performance.now() - last > 50) {
      await new Promise((done) => setTimeout(done));
      last = performance.now();
    }
  }
}
