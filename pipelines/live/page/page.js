// The page: buttons, files, the microphone; and what the worker says, shown. Text only ever becomes text nodes.
import { decode, PIECE } from "./sound.js";
import { readTokens } from "./words.js";

const ROWS = 200; // of the table of words
const SURE = 1; // seconds behind which a word that could go on is read out
const GRAPHS = { "model.int8.onnx": "int8", "model.onnx": "float32" }; // the first that is there is taken
const MICROPHONE = {
  NotAllowedError: "The microphone was refused. Allow it in the browser's settings of this page, and press Listen again.",
  NotFoundError: "No microphone was found. Connect one, and press Listen again.",
  NotReadableError: "The microphone cannot be opened: another program may hold it. Close that, and press Listen again.",
};
const get = (id) => document.getElementById(id);

/** What a person can understand and change: one sentence. */
class Trouble extends Error {}

let worker, about, tokens;
let turn = Promise.resolve(), waiting = true; // one thing after the other; whether the page waits for something, and takes no orders
let stop = null; // ends what is heard now
let last = null; // the last word, where it is in the text and can still go on
let delays = { sound: [], computing: [] };

/** The worker, made of a blob: so the page's Content-Security-Policy is its own too; from the server it would have none. */
function workerOf() {
  const code = new Blob([`import ${JSON.stringify(new URL("worker.js", import.meta.url))};`], { type: "text/javascript" });
  return new Worker(URL.createObjectURL(code), { type: "module" });
}

async function fetched(url, what, remedy) {
  const answer = await fetch(url, { cache: "no-cache" }).catch(() => null);
  if (!answer?.ok) throw new Trouble(`${what} is not there${answer ? ` (the server answers ${answer.status})` : ""}; ${remedy}.`);
  return answer;
}

/** An answer of the worker: the first message that holds this name; an Error when it fails instead. */
function answer(name) {
  const over = new AbortController();
  return new Promise((done, failed) => {
    const on = (event, act) => worker.addEventListener(event, act, { signal: over.signal });
    on("message", ({ data }) => {
      if (data.failed !== undefined) failed(new Error(data.failed));
      if (name in data) done(data);
    });
    on("error", () => failed(new Error("a part of the page is not there, or this browser is too old for it")));
  }).finally(() => over.abort());
}

async function start() {
  const again = "build the page again with pipelines/live/build.py";
  about = await (await fetched("model/export.json", "model/export.json, which describes the network,", again)).json().catch(() => null);
  if (about?.format !== "asr_kd-export" || about.version !== 1) throw new Trouble("model/export.json is not of an export that this page knows; build the page again.");
  if (about.interface !== "stream") throw new Trouble(`This network was exported as ${about.interface}, and the page hears those of interface stream; export it so, and build the page again.`);
  tokens = readTokens(await (await fetched("model/tokens.txt", "model/tokens.txt, the network's units,", again)).text());
  const names = Object.keys(GRAPHS).filter((name) => name in about.files);
  get("graph").replaceChildren(...names.map((name) => new Option(GRAPHS[name], name)));
  get("graphs").hidden = names.length < 2;
  worker = workerOf();
  worker.addEventListener("message", ({ data }) => { if (data.heard) show(data.heard); });
  await load();
  const asked = new URLSearchParams(location.search).get("file");
  if (asked) await hearFile(asked, () => fetched(asked, asked, "put the file beside the page"), false);
}

async function load() {
  const name = get("graph").value, ready = answer("loaded");
  enable(false);
  say("Loading the network.");
  worker.postMessage({ load: { path: `model/${name}`, about, tokens } });
  await ready.catch((error) => { throw new Trouble(`model/${name} cannot be loaded (${error.message}); export the network and build the page again.`); });
  const model = about.model, size = (about.files[name].bytes / 1e6).toFixed(2);
  get("network").textContent = `${model.kind}${model.layers ? ` ${model.layers} × ${model.size}` : ""}, ${GRAPHS[name]}, ${size} MB, ${about.units} units; hears ` +
    `${about.features.sample_rate.toLocaleString("en")} Hz, and ${about.lookahead_ms} ms ahead of what it says`;
  enable(true);
  say("Ready.");
}

async function microphone() {
  await live(async (context) => {
    say("Waiting for permission to use the microphone.");
    const asked = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false }; // the training heard sound as it is
    const stream = await navigator.mediaDevices.getUserMedia({ audio: asked }).catch((error) => {
      throw new Trouble(MICROPHONE[error.name] ?? `The microphone cannot be opened (${error.message || error.name}).`);
    });
    const [track] = stream.getAudioTracks();
    track.addEventListener("ended", () => stop?.());
    return { node: context.createMediaStreamSource(stream), what: "Listening.", close: () => track.stop() };
  });
}

/** Hear what `read` brings, and play it where that is wanted. */
async function hearFile(name, read, aloud) {
  say(`Reading ${name}.`);
  const { samples, rate } = await read().then((file) => file.arrayBuffer()).then(decode).catch((error) => {
    throw error instanceof Trouble ? error : new Trouble(`${name} cannot be decoded as audio by this browser; give WAV, FLAC, MP3 or Ogg.`);
  });
  if (!samples.length) throw new Trouble(`${name} holds no sound.`);
  if (!aloud) return hear(`Hearing ${name}.`, { rate, samples }, [samples.buffer], () => worker.postMessage({ stop: true }));
  return live(async (context) => {
    const node = new AudioBufferSourceNode(context, { buffer: new AudioBuffer({ length: samples.length, sampleRate: rate }) });
    node.buffer.copyToChannel(samples, 0);
    node.connect(context.destination);
    node.addEventListener("ended", () => stop?.());
    return { node, what: `Playing ${name}.`, begin: () => node.start(), close: () => {} };
  }, { sampleRate: rate }); // else the browser would convert it
}

/** Hear a source while it sounds: `open` makes its `node` in a context, which has these `options`. */
async function live(open, options = {}) {
  if (!isSecureContext) throw new Trouble("A browser lets a page hear live sound only from https or from this machine itself; open http://localhost, or serve the page by https.");
  const context = new AudioContext(options);
  let source;
  try {
    await context.audioWorklet.addModule("worklet.js");
    source = await open(context);
    context.resume(); // where that takes a press of a button more, one sees that nothing is heard
    const { port1, port2 } = new MessageChannel(), samples = Math.round(context.sampleRate * PIECE);
    const pieces = new AudioWorkletNode(context, "pieces", { numberOfOutputs: 0, processorOptions: { samples } });
    pieces.port.postMessage({ to: port1 }, [port1]);
    source.node.connect(pieces);
    source.begin?.();
    const end = () => (context.state === "running" ? pieces.port.postMessage({ end: true }) : worker.postMessage({ stop: true }));
    await hear(source.what, { rate: context.sampleRate, port: port2 }, [port2], end);
  } finally {
    source?.close();
    await context.close();
  }
}

/** Let the worker hear a recording until it ends, or is stopped by `end`. */
async function hear(what, message, transfer, end) {
  for (const id of ["text", "open", "words"]) get(id).replaceChildren();
  for (const id of ["seconds", "count", "by-sound", "by-computing", "factor"]) get(id).textContent = "–";
  get("hint").hidden = true;
  [last, delays] = [null, { sound: [], computing: [] }];
  get("listen").textContent = "Stop";
  say(what);
  [stop, waiting] = [end, false];
  const done = answer("done");
  worker.postMessage({ hear: message }, transfer);
  try {
    await done.catch((error) => { throw new Trouble(`The network cannot go on (${error.message}).`); });
    say("Done.");
  } finally {
    [stop, waiting] = [null, true];
    get("listen").textContent = "Listen";
    get("loudness").value = -60;
  }
}

/** What the worker has heard by now. */
function show({ final, open, seconds, spent, peak }) {
  for (const word of final) {
    const sound = word.known.heard - word.end;
    delays.sound.push(sound);
    delays.computing.push(word.known.computing);
    write(word);
    last = null;
    const row = get("words").insertRow(0), head = document.createElement("th");
    head.scope = "row";
    head.textContent = word.text;
    row.append(head);
    for (const cell of [`${word.start.toFixed(2)} – ${word.end.toFixed(2)}`, ms(sound), ms(word.known.computing)]) row.insertCell().textContent = cell;
    if (get("words").rows.length > ROWS) get("words").deleteRow(-1);
  }
  const sure = open && (last || seconds - open.end > SURE);
  if (sure) write(open);
  get("open").textContent = open && !sure ? open.text : "";
  get("text").parentElement.scrollTop = get("text").parentElement.scrollHeight;
  if (final.length) {
    get("by-sound").textContent = ms(median(delays.sound));
    get("by-computing").textContent = ms(median(delays.computing));
  }
  get("count").textContent = delays.sound.length.toLocaleString("en");
  get("seconds").textContent = `${seconds.toFixed(1)} s`;
  get("factor").textContent = seconds ? (spent / seconds).toFixed(4) : "–";
  get("loudness").value = Math.max(-60, 20 * Math.log10(peak || 1e-9));
}

/** Put a word into the text, in place of what was known of it. */
function write({ text }) {
  if (!last) get("text").append(last = document.createElement("span"));
  if (last.textContent !== `${text} `) last.textContent = `${text} `; // what changes is read out
}

const ms = (seconds) => `${(1000 * seconds).toFixed(seconds < 0.02 ? 1 : 0)} ms`;
const median = (values) => values.toSorted((a, b) => a - b)[values.length >> 1];
const say = (text) => { get("status").textContent = text; };

function enable(on) {
  for (const id of ["listen", "choose"]) get(id).disabled = !on;
}

/** Do one thing behind what runs, which is stopped; say what went wrong in a sentence. */
function next(act) {
  stop?.();
  turn = turn.then(() => {
    waiting = true;
    get("trouble").textContent = "";
    return act();
  }).catch((error) => {
    say("");
    get("trouble").textContent = error instanceof Trouble ? error.message : `Something in the page is wrong: ${error.message}`;
    if (!(error instanceof Trouble)) reportError(error);
  }).finally(() => { waiting = false; });
}

const given = (file) => next(() => hearFile(file.name, async () => file, get("aloud").checked));
get("listen").addEventListener("click", () => {
  if (stop) stop();
  else if (!waiting) next(microphone);
});
get("choose").addEventListener("click", () => get("file").click());
get("file").addEventListener("change", ({ target }) => {
  if (target.files.length && !waiting) given(target.files[0]);
  target.value = ""; // the same file may be chosen again
});
get("graph").addEventListener("change", () => next(load));
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
for (const name of ["dragleave", "drop"]) addEventListener(name, () => document.body.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file && !waiting && !get("choose").disabled) given(file);
});

next(start);
