// Sound as the browser has it → pieces for the worker, the mean of their channels. Silence that nobody sends is none.
registerProcessor("pieces", class extends AudioWorkletProcessor {
  #to = null; #piece; #filled = 0; #ended = false;

  constructor({ processorOptions }) {
    super();
    this.#piece = new Float32Array(processorOptions.samples);
    this.port.onmessage = ({ data }) => {
      if (data.to) this.#to = data.to;
      else this.#end();
    };
  }

  process([channels]) {
    for (let at = 0; this.#to && !this.#ended && at < (channels[0]?.length ?? 0); at++) {
      let sum = 0;
      for (const channel of channels) sum += channel[at];
      this.#piece[this.#filled++] = sum / channels.length;
      if (this.#filled === this.#piece.length) this.#send();
    }
    return !this.#ended;
  }

  #send() {
    const samples = this.#piece.slice(0, this.#filled);
    this.#to.postMessage({ samples, arrived: Date.now() }, [samples.buffer]);
    this.#filled = 0;
  }

  #end() {
    if (this.#ended) return;
    this.#ended = true;
    this.#send();
    this.#to.postMessage({ end: true });
  }
});
