// What the cache does, asked once a second while somebody looks. No libraries, nothing from elsewhere.
"use strict";

const $ = (id) => document.getElementById(id);
const EVERY_MS = 1000;
const MOSAIC_EVERY = 2; // of these
const HISTORY = 180;

// ---- asking the server

let key = sessionStorage.getItem("mosaickv-key") || "";
let asking = null; // the dialog's promise, while it is open

function headers(more) {
  return Object.assign(key ? { Authorization: `Bearer ${key}` } : {}, more);
}

async function ask(path, options = {}) {
  const sent = key;
  const answer = await fetch(path, { ...options, headers: headers(options.headers) });
  if (answer.status !== 401) return answer;
  if (sent === key) await askForKey();
  return ask(path, options);
}

function askForKey() {
  asking = asking || new Promise((done) => {
    const dialog = $("key-dialog");
    dialog.showModal();
    dialog.addEventListener("close", () => {
      key = $("key").value;
      sessionStorage.setItem("mosaickv-key", key);
      $("key").value = "";
      asking = null;
      done();
    }, { once: true });
  });
  return asking;
}

async function json(path) {
  const answer = await ask(path);
  if (!answer.ok) throw new Error(await reason(answer));
  return answer.json();
}

async function reason(answer) {
  const text = await answer.text();
  try { return JSON.parse(text).error.message; } catch { return `${answer.status} ${text.slice(0, 200)}`; }
}

// ---- numbers for people

function bytes(n) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (n >= size) return `${(n / size).toFixed(n >= 100 * size ? 0 : 1)} ${unit}`;
  }
  return `${Math.round(n)} B`;
}

const count = (n) => Math.round(n).toLocaleString("en");

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Dark blue over green to yellow (after viridis): even in lightness, and told apart by any eyes.
const SHADES = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

function shade(bits) {
  const at = Math.min(1, Math.log2(1 + bits) / Math.log2(17)) * (SHADES.length - 1);
  const low = Math.min(SHADES.length - 2, Math.floor(at));
  const mix = SHADES[low].map((x, i) => Math.round(x + (at - low) * (SHADES[low + 1][i] - x)));
  return `rgb(${mix.join(",")})`;
}

// ---- lines over time

const past = [];

function lines(canvas, series) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth || 440, height = 160;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const top = Math.max(1e-9, ...series.flatMap((s) => s.values));
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = colour("--quiet");
  pen.strokeStyle = colour("--line");
  for (const share of [0, 0.5, 1]) {
    const y = height - 6 - share * (height - 24);
    pen.beginPath(); pen.moveTo(0, y); pen.lineTo(width, y); pen.stroke();
    if (share) pen.fillText(series[0].say(top * share), 2, y - 3);
  }
  for (const { values, style, dash } of series) {
    pen.strokeStyle = colour(style);
    pen.lineWidth = 2;
    pen.setLineDash(dash);
    pen.beginPath();
    values.forEach((value, i) => {
      const x = width - (values.length - 1 - i) * (width / (HISTORY - 1));
      const y = height - 6 - (value / top) * (height - 24);
      if (i) pen.lineTo(x, y); else pen.moveTo(x, y);
    });
    pen.stroke();
  }
  pen.setLineDash([]);
}

function keys(list, entries) {
  list.replaceChildren(...entries.map(([kind, look, text]) => {
    const item = document.createElement("li"), mark = document.createElement("span");
    mark.className = `mark ${kind} ${look}`;
    item.append(mark, text);
    return item;
  }));
}

function drawHistory() {
  const of = (name) => past.map((now) => now[name]);
  const now = past[past.length - 1];
  lines($("memory"), [
    { values: of("stored_bytes"), style: "--stored", dash: [], say: bytes },
    { values: of("equivalent"), style: "--exact", dash: [7, 4], say: bytes },
    { values: of("budget_bytes"), style: "--budget", dash: [2, 3], say: bytes },
  ]);
  keys($("memory-keys"), [
    ["stored", "", `stored ${bytes(now.stored_bytes)} (${bytes(now.prefix_bytes)} of them kept for others)`],
    ["exact", "dashed", `what runs, as f16 ${bytes(now.equivalent)}`],
    ["budget", "dotted", `budget ${bytes(now.budget_bytes)}`],
  ]);
  $("memory").setAttribute("aria-label",
    `Bytes over time: now ${bytes(now.stored_bytes)} stored of a budget of ${bytes(now.budget_bytes)}`);
  lines($("speed"), [
    { values: of("out_rate"), style: "--stored", dash: [], say: (n) => n.toFixed(0) },
    { values: of("in_rate"), style: "--exact", dash: [7, 4], say: (n) => n.toFixed(0) },
  ]);
  const read = now.read_a_token;
  keys($("speed-keys"), [
    ["stored", "", `answered ${now.out_rate.toFixed(1)}`],
    ["exact", "dashed", `of prompts ${now.in_rate.toFixed(0)}`],
    ...(read ? [["budget", "dotted", `${bytes(read)} of cache read a token so far`]] : []),
  ]);
  $("speed").setAttribute("aria-label",
    `Tokens a second over time: now ${now.out_rate.toFixed(1)} answered and ${now.in_rate.toFixed(0)} of prompts`);
}

// ---- once a second

let last = null, ticks = 0;

async function tick() {
  if (document.hidden || asking) return;
  let live;
  try {
    live = await json("/v1/kv/live");
  } catch (error) {
    $("state").textContent = `The server does not answer: ${error.message}`;
    return;
  }
  const at = performance.now();
  const seconds = last ? (at - last.at) / 1000 : 1;
  const rate = (name) => (last ? Math.max(0, live[name] - last.live[name]) / seconds : 0);
  past.push({
    ...live,
    equivalent: live.exact_bytes,
    out_rate: rate("output_tokens"),
    in_rate: rate("prompt_tokens"),
    read_a_token: live.output_tokens ? live.read_bytes / live.output_tokens : 0,
  });
  if (past.length > HISTORY) past.shift();
  last = { at, live };
  const more = live.preemptions ? `, ${count(live.preemptions)} times began again` : "";
  const harder = live.harder ? `, ${count(live.harder)} compressed harder` : "";
  $("state").textContent =
    `${live.model}, ${live.kv_format} unless asked: ${live.running} run, ${live.waiting} wait${more}${harder}`;
  drawHistory();
  showRequests(live.requests);
  showQuality(live.shadows);
  showWhatIf(live);
  await showSources(live.requests);
  if (ticks++ % MOSAIC_EVERY === 0) showMosaic().catch(() => {});
}

async function loop() {
  try { await tick(); } finally { setTimeout(loop, EVERY_MS); }
}

// ---- tables

function cells(row, texts) {
  row.replaceChildren(...texts.map((text) => {
    const cell = document.createElement("td");
    cell.append(text);
    return cell;
  }));
  return row;
}

function showRequests(requests) {
  const body = $("requests").tBodies[0];
  const known = new Map([...body.rows].map((row) => [row.dataset.task, row]));
  body.replaceChildren(...requests.map((request) => {
    const row = known.get(String(request.id_task)) || document.createElement("tr");
    const texts = [request.id, count(request.n_prompt_tokens), count(request.n_decoded), request.kv_format, request.request_id];
    if (!row.dataset.task) {
      row.dataset.task = request.id_task;
      const cancel = document.createElement("button");
      cancel.type = "button";
      cancel.textContent = "Cancel";
      cancel.setAttribute("aria-label", `Cancel the request in slot ${request.id}`);
      cancel.addEventListener("click", async () => {
        cancel.disabled = true;
        const done = await ask(`/slots/${request.id}?action=cancel&task=${request.id_task}`, { method: "POST" });
        if (!done.ok) {
          cancel.disabled = false;
          $("state").textContent = await reason(done);
        }
      });
      cells(row, [...texts.map(String), cancel]);
    }
    // The button stays, and with it the focus.
    texts.forEach((text, i) => { row.cells[i].textContent = text; });
    return row;
  }));
  $("requests-none").hidden = requests.length > 0;
}

function showQuality(shadows) {
  $("quality").hidden = shadows.length === 0;
  $("quality-none").hidden = shadows.length > 0;
  $("quality").tBodies[0].replaceChildren(...shadows.map((shadow) =>
    cells(document.createElement("tr"),
      [shadow.format, `${(100 * shadow.top1).toFixed(1)} %`, shadow.kl.toFixed(4), count(shadow.steps)])));
}

function showWhatIf(live) {
  const ratio = Number($("if-ratio").value);
  const tokens = Math.min(live.context, 2 ** Number($("if-tokens").value));
  const one = (live.exact_bytes_per_token * tokens) / ratio;
  $("if-ratio-is").textContent = ratio;
  $("if-tokens-is").textContent = count(tokens);
  $("if-says").textContent =
    `One takes ${bytes(one)} in place of ${bytes(one * ratio)}, and ${count(Math.floor(live.budget_bytes / one))} fit into ` +
    `${bytes(live.budget_bytes)} once they are read (while one is read it takes more).`;
}

for (const id of ["if-ratio", "if-tokens"]) $(id).addEventListener("input", () => last && showWhatIf(last.live));

// ---- the mosaic

let shown = null;   // what was drawn
let pointed = null; // { head, part }
let asked = null;   // the path of what is to be shown
const ROW = 8, GAP = 2, LEFT = 64;

async function showSources(requests) {
  let contexts = [];
  if (ticks % 5 === 0) {
    const list = await ask("/v1/kv/contexts");
    contexts = list.ok ? (await list.json()).data : [];
    showSources.contexts = contexts.map((context) => context.name || context.id);
  }
  const options = [
    ...requests.filter((request) => request.n_decoded > 0).map((request) => [`task ${request.id_task}`, `slot ${request.id}: ${request.kv_format}`]),
    ...(showSources.contexts || []).map((name) => [`context ${name}`, `context ${name}`]),
  ];
  const select = $("source"), chosen = select.value;
  const isThere = options.some(([value]) => value === chosen);
  if (!isThere && chosen) options.unshift([chosen, `${select.selectedOptions[0].textContent.replace(/ \(as it was\)$/, "")} (as it was)`]);
  const mine = options.find(([value]) => own && value === `task ${own.task}`);
  const same = options.length === select.options.length && options.every(([value, text], i) => select.options[i].value === value && select.options[i].textContent === text);
  if (!same) {
    if (!options.length || !chosen) options.unshift(["", "nothing yet"]);
    select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    select.value = chosen;
  }
  if (mine && !own.isShown) {
    own.isShown = true;
    select.value = mine[0];
  } else if (!select.value && requests.length && options.length && options[0][0].startsWith("task")) {
    select.value = options[0][0];
  }
}

$("source").addEventListener("change", () => {
  asked = null;
  showMosaic();
});

async function showMosaic() {
  const [kind, ...rest] = $("source").value.split(" ");
  if (!kind) return;
  // Of an answer that has ended, what was seen last stays.
  if (kind === "task" && !runs(rest[0])) return;
  const name = encodeURIComponent(rest.join(" "));
  const path = kind === "task" ? `/v1/kv/mosaic/${name}` : `/v1/kv/contexts/${name}/mosaic`;
  // A context stays as it is, and so does the reason why one can't be shown, until it is chosen anew.
  if (kind === "context" && asked === path) return;
  asked = path;
  const answer = await ask(path);
  const got = answer.ok ? await answer.json() : await reason(answer);
  // Another one was chosen meanwhile.
  if (asked !== path) return;
  if (answer.ok) {
    shown = Object.assign(got, { path });
    drawMosaic();
  } else if (kind === "context") {
    shown = pointed = null;
    $("mosaic").getContext("2d").reset();
    $("mosaic-figures").textContent = got;
    $("mosaic-part").textContent = $("mosaic-text").textContent = "";
  }
}

const runs = (task) => last && last.live.requests.some((request) => String(request.id_task) === task);

function drawMosaic(isNew) {
  const canvas = $("mosaic"), ratio = window.devicePixelRatio || 1;
  const width = Math.max(320, canvas.parentElement.clientWidth), height = shown.heads.length * ROW + 18;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  const most = Math.max(0, ...shown.heads.map((head) => Math.max(...head.parts.map((part) => part.read || 0))));
  shown.heads.forEach((head, row) => {
    const y = row * ROW;
    if (head.head === 0 && (head.layer % 5 === 0 || shown.layers < 8)) {
      pen.fillStyle = colour("--quiet");
      pen.fillText(`layer ${head.layer}`, 0, y + ROW / 2);
    }
    places(head, width, (part, i, x, wide) => {
      pen.fillStyle = shade(part.bits);
      pen.globalAlpha = brightness(part, most);
      pen.fillRect(x, y, Math.max(wide, 0.5), ROW - GAP);
      pen.globalAlpha = 1;
      if (pointed && pointed.row === row && pointed.part === i) {
        pen.strokeStyle = colour("--ink");
        pen.lineWidth = 2;
        pen.strokeRect(x + 1, y, Math.max(wide - 2, 2), ROW - GAP);
      }
    });
  });
  pen.fillStyle = colour("--quiet");
  const isOrdered = shown.order === "position";
  pen.fillText(isOrdered ? "first token" : "what counts most", LEFT, height - 8);
  const end = isOrdered ? "newest" : "what counts least, dropped, then the newest";
  pen.fillText(end, width - pen.measureText(end).width, height - 8);
  const times = (shown.exact_bytes / Math.max(1, shown.stored_bytes)).toFixed(1);
  const says = `${shown.format}: ${count(shown.tokens)} tokens in ${bytes(shown.stored_bytes)} of ${bytes(shown.exact_bytes)} (${times}x less)`;
  $("mosaic-figures").textContent = says;
  canvas.setAttribute("aria-label", `Mosaic of ${shown.heads.length} heads, ${says}`);
  if (pointed) tell(isNew);
}

// What steps often select is bright; what they always read, or nobody has counted, is not faded.
function brightness(part, most) {
  return part.read === undefined || !most ? 1 : 0.25 + 0.75 * Math.sqrt(part.read / most);
}

function places(head, width, each) {
  const all = head.parts.reduce((sum, part) => sum + part.tokens, 0) || 1;
  const scale = (width - LEFT) / all;
  let x = LEFT;
  head.parts.forEach((part, i) => {
    each(part, i, x, part.tokens * scale);
    x += part.tokens * scale;
  });
}

// Says what the part is that is pointed at; aloud only if somebody has just pointed.
function tell(isNew) {
  const head = shown.heads[pointed.row], part = head && head.parts[pointed.part];
  if (!part) { pointed = null; return; }
  const where = part.first === null ? "" : `, from token ${count(part.first)}`;
  const loss = part.loss === undefined ? "" : `, loss ${part.loss.toPrecision(2)}`;
  const read = part.read === undefined ? "" : `, ${(100 * part.read).toFixed(1)} % of them read at a step`;
  $("mosaic-part").setAttribute("aria-live", isNew ? "polite" : "off");
  $("mosaic-part").textContent =
    `Layer ${head.layer}, KV head ${head.head}: ${count(part.tokens)} tokens${where}${read}, ${part.bits.toFixed(2)} bits a scalar, ${bytes(part.bytes)}; ${shown.kinds[part.kind]}${loss}`;
  if (part.first !== null) {
    say(textOf([...Array(part.tokens).keys()].map((i) => part.first + i)));
  } else if (!shown.text) {
    say("");
  } else if (!head.isPlaced) {
    placeTokens(pointed.row);
  } else if (head.parts.some((part) => part.places)) {
    say(textOf(part.places || []));
  } else {
    say("Which tokens these are is remembered by a server that is started with --remember-places, of what it has read itself.");
  }
}

function say(text) {
  $("mosaic-text").textContent = text.length > 1200 ? `${text.slice(0, 600)} … ${text.slice(-600)}` : text;
}

// Tokens that follow each other together, others apart; without those whose texts are not there.
function textOf(places) {
  const known = places.filter((place) => shown.text && shown.text[place - shown.text_from] !== undefined);
  return known.map((place, i) => {
    const follows = i === 0 || place === known[i - 1] + 1;
    return (follows ? "" : " · ") + shown.text[place - shown.text_from];
  }).join("");
}

// Asks where the tokens of a head are, while somebody points at it. The head is then shown as it is by now.
async function placeTokens(row) {
  const of = shown, head = of.heads[row];
  if (head.isAsked) return;
  head.isAsked = true;
  const isTask = of.path.startsWith("/v1/kv/mosaic/");
  if (isTask && !runs(of.path.split("/").pop())) {
    say("The answer has ended.");
    return;
  }
  try {
    const answer = await ask(`${of.path}?layer=${head.layer}&head=${head.head}`);
    if (!answer.ok) throw new Error(await reason(answer));
    const one = await answer.json();
    const number = (name) => (of.kinds.includes(name) ? of.kinds.indexOf(name) : of.kinds.push(name) - 1);
    head.parts = one.heads[0].parts.map((part) => ({ ...part, kind: number(one.kinds[part.kind]) }));
    head.isPlaced = true;
    if (shown === of) drawMosaic();
  } catch {
    head.isAsked = false;
  }
}

function point(event) {
  if (!shown) return;
  const box = $("mosaic").getBoundingClientRect();
  const row = Math.floor((event.clientY - box.top) / ROW), x = event.clientX - box.left;
  const head = shown.heads[row];
  if (!head || x < LEFT) return;
  let found = null;
  places(head, box.width, (part, i, left, wide) => { if (x >= left && x <= left + Math.max(wide, 1)) found = i; });
  if (found !== null && !(pointed && pointed.row === row && pointed.part === found)) {
    pointed = { row, part: found };
    drawMosaic(true);
  }
}

function lookAway() {
  pointed = null;
  if (shown) drawMosaic();
}

$("mosaic").addEventListener("pointermove", point);
$("mosaic").addEventListener("pointerdown", point);
$("mosaic").addEventListener("pointerleave", (event) => event.pointerType === "mouse" && lookAway());
$("mosaic").addEventListener("blur", lookAway);
$("mosaic").addEventListener("keydown", (event) => {
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!move || !shown) return;
  event.preventDefault();
  const from = pointed || { row: 0, part: -1 };
  const row = Math.min(shown.heads.length - 1, Math.max(0, from.row + move[0]));
  const part = Math.min(shown.heads[row].parts.length - 1, Math.max(0, from.part + move[1]));
  pointed = { row, part };
  drawMosaic(true);
});

function drawLegend() {
  const pen = $("legend").getContext("2d");
  for (let x = 0; x < 180; x++) {
    pen.fillStyle = shade((x / 179) * 16);
    pen.fillRect(x, 0, 1, 12);
  }
}

// ---- asking about a document

let own = null; // what this page asked last: { id, task, isShown, stop }

$("document").addEventListener("dragover", (event) => { event.preventDefault(); $("document").classList.add("over"); });
$("document").addEventListener("dragleave", () => $("document").classList.remove("over"));
$("document").addEventListener("drop", async (event) => {
  event.preventDefault();
  $("document").classList.remove("over");
  const file = event.dataTransfer.files[0];
  $("document").value = file ? await file.text() : event.dataTransfer.getData("text");
});
$("stop").addEventListener("click", () => own && own.stop.abort());

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("document").value, question = $("question").value;
  const messages = [{ role: "user", content: text ? `${text}\n\n${question}` : question }];
  const body = { messages, stream: true, temperature: 0, max_tokens: Number($("most").value) || 128 };
  if ($("ratio").value) body.kv = { format: $("ratio").value };
  const answer = $("answer"), id = `page-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
  own = { id, stop: new AbortController(), isShown: false };
  answer.textContent = "";
  answer.className = "";
  $("bill").textContent = "It reads …";
  $("send").disabled = true;
  $("stop").disabled = false;
  const start = performance.now();
  try {
    await stream(body, id, (event) => {
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices && event.choices[0] && event.choices[0].delta.content;
      if (piece) {
        answer.textContent += piece;
        if (!own.first) own.first = (performance.now() - start) / 1000;
      }
      const slot = last && last.live.requests.find((request) => request.request_id === id);
      if (slot) own.task = slot.id_task;
      if (event.kv) {
        $("bill").textContent =
          `${event.kv.format}: ${bytes(event.kv.stored_bytes)} in place of ${bytes(event.kv.exact_bytes)} (${event.kv.ratio.toFixed(1)}x less), ` +
          (event.kv.read_bytes_per_step === undefined ? "" : `${bytes(event.kv.read_bytes_per_step)} read a token; `) +
          `the first token came after ${own.first ? own.first.toFixed(1) : "?"} s`;
      }
    });
    if ($("bill").textContent === "It reads …") $("bill").textContent = "";
  } catch (error) {
    const isStopped = error.name === "AbortError";
    $("bill").textContent = isStopped ? "Stopped." : "";
    if (!isStopped) {
      answer.className = "failed";
      answer.textContent = error.message;
    }
  } finally {
    $("send").disabled = false;
    $("stop").disabled = true;
  }
});

async function stream(body, id, each) {
  const answer = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Request-Id": id },
    body: JSON.stringify(body),
    signal: own.stop.signal,
  });
  if (!answer.ok) throw new Error(await reason(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").find((line) => line.startsWith("data: "));
      if (data && data !== "data: [DONE]") each(JSON.parse(data.slice(6)));
    }
  }
}

window.addEventListener("resize", () => { if (shown) drawMosaic(); if (past.length) drawHistory(); });
drawLegend();
loop();
