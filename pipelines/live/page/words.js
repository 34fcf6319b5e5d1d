// Log-probabilities as they come → words: greedy CTC, as asr_kd/export/README.md describes it.

/** The names of the units, from the text of tokens.txt: a name, a space and its number in each line. */
export const readTokens = (text) => text.split("\n").filter(Boolean).map((line) => line.slice(0, line.lastIndexOf(" ")));

export class Words {
  #tokens; #seconds; #last = 0; #frame = 0; #word = null;

  /** `tokens`: names of the units; `seconds`: period of a frame. */
  constructor(tokens, seconds) {
    [this.#tokens, this.#seconds] = [tokens, seconds];
  }

  /**
   * Hear the next rows, Float32Array [frames × units], which became known with `piece`.
   *
   * Returns `final`, the words that nothing can change any more, and `open`, the one that may go on, or null. A word has `text`, `start` and
   * `end` in seconds, those of the frames that say its first and its last unit, and as `known` the piece that gave it its present text.
   */
  push(rows, frames, piece, end) {
    const units = this.#tokens.length, final = [];
    for (let frame = 0; frame < frames; frame++, this.#frame++) {
      const first = frame * units;
      if (Number.isNaN(rows[first])) throw new Error("it answers with NaN, its weights are broken");
      let best = 0;
      for (let unit = 1; unit < units; unit++) if (rows[first + unit] > rows[first + best]) best = unit;
      if (best && best !== this.#last) {
        const name = this.#tokens[best];
        if (!this.#word || name.startsWith("▁")) {
          final.push(this.#word);
          this.#word = { name: "", start: this.#frame * this.#seconds };
        }
        this.#word.name += name;
        this.#word.known = piece;
      }
      if (best) this.#word.end = (this.#frame + 1) * this.#seconds;
      this.#last = best;
    }
    if (end) {
      final.push(this.#word);
      this.#word = null;
    }
    return { final: final.map(told).filter(Boolean), open: told(this.#word) };
  }
}

/** A word as it is shown; null when there is none, or a lone space. */
function told(word) {
  const text = word?.name.replaceAll("▁", " ").trim();
  return text ? { text, start: word.start, end: word.end, known: word.known } : null;
}
