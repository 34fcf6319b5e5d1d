// Sound of one rate → sound of another, as it comes. Browsers' own conversion lets through much of what lies above the new band
// (Chromium from 48 to 8 kHz: a tone of 5 kHz comes back at 3 kHz, 16 dB below), which a network then hears as speech.

// zero crossings of the sinc on either side, and Kaiser's parameter: what would fold back is 80 dB down, and the band flat up to 0.9 of it
const REACH = 64, KAISER = 8, BAND = 0.955;

export class Resampler {
  #up; #down; #half; #scale; #waiting; #at; #phase = 0; #weights = new Map();

  /** `from`, `to`: rates in Hz. */
  constructor(from, to) {
    const common = divisor(from, to);
    [this.#up, this.#down] = [to / common, from / common];
    this.#scale = BAND * Math.min(1, to / from);
    this.#half = Math.ceil(REACH / this.#scale);
    this.#waiting = new Float32Array(this.#half - 1);
    this.#at = this.#half - 1; // where in `waiting` the next answer lies, with `phase` / `up` of a sample
  }

  /** Float32Array of the next samples → of those that they make known. */
  push(samples) {
    if (this.#up === this.#down) return samples;
    const half = this.#half, sound = new Float32Array(this.#waiting.length + samples.length), found = [];
    sound.set(this.#waiting);
    sound.set(samples, this.#waiting.length);
    for (; this.#at + half < sound.length; this.#step()) {
      const weights = this.#weightsOf(this.#phase), first = this.#at - half + 1;
      let sum = 0;
      for (let tap = 0; tap < weights.length; tap++) sum += weights[tap] * sound[first + tap];
      found.push(sum);
    }
    const gone = Math.min(sound.length, this.#at - half + 1);
    this.#waiting = sound.slice(gone);
    this.#at -= gone;
    return Float32Array.from(found);
  }

  /** What is left when the sound has ended. */
  finish() {
    return this.#up === this.#down ? new Float32Array(0) : this.push(new Float32Array(this.#half));
  }

  #step() {
    this.#phase += this.#down;
    this.#at += Math.floor(this.#phase / this.#up);
    this.#phase %= this.#up;
  }

  #weightsOf(phase) {
    if (!this.#weights.has(phase)) {
      const weights = Float64Array.from({ length: 2 * this.#half }, (_, tap) => {
        const away = tap - this.#half + 1 - phase / this.#up;
        return sinc(this.#scale * away) * bessel(KAISER * Math.sqrt(Math.max(0, 1 - (away / this.#half) ** 2)));
      });
      const sum = weights.reduce((total, weight) => total + weight);
      this.#weights.set(phase, weights.map((weight) => weight / sum));
    }
    return this.#weights.get(phase);
  }
}

const divisor = (a, b) => (b ? divisor(b, a % b) : a);
const sinc = (x) => (x ? Math.sin(Math.PI * x) / (Math.PI * x) : 1);

/** The modified Bessel function of the first kind, order 0, by its series. */
function bessel(x) {
  let sum = 1;
  for (let k = 1, term = 1; term > 1e-12 * sum; k++) sum += term *= (x / (2 * k)) ** 2;
  return sum;
}
