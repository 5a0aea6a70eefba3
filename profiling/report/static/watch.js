// Asks the server for what is new and draws it. What comes from the run is only ever inserted as text.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const KEPT_LOG = 400;
const PHASES = new Map(Object.entries({
  data: "waiting for data", transfer: "to the device", teacher: "teacher forward", student: "student forward",
  losses: "losses", backward: "backward", compression: "compression", exposed: "waiting for communication",
  optimizer: "optimizer", other: "other",
}));

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  Object.assign(node, properties);
  node.append(...children);
  return node;
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };

// ---- numbers

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function digits(value, count = 4) {
  if (typeof value === "string") return value;  // nan, inf: as the run logged them
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(count - 2);
  if (size >= 10 ** (count - 1)) return whole.format(value);
  return new Intl.NumberFormat("en", { maximumSignificantDigits: count, minimumSignificantDigits: Number.isInteger(value) ? 1 : count }).format(value);
}

const percent = (share) => (Number.isFinite(share) ? `${(100 * share).toFixed(1)}%` : "–");
const bytes = (count) => (Number.isFinite(count) ? (count < 2 ** 30 ? `${digits(count / 2 ** 20, 3)} MiB` : `${digits(count / 2 ** 30, 3)} GiB`) : "–");

function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 1e-3) return `${digits(value * 1e6, 3)} µs`;
  return value < 1 ? `${digits(value * 1e3, 3)} ms` : `${digits(value, 3)} s`;
}

function duration(value) {
  if (!Number.isFinite(value)) return "–";
  const left = Math.max(0, Math.round(value));
  const [days, hours, minutes] = [Math.floor(left / 86400), Math.floor(left / 3600) % 24, Math.floor(left / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${left % 60} s` : `${left} s`;
}

function clock(unix, withDay = false) {
  if (!Number.isFinite(unix)) return "–";
  const date = new Date(unix * 1000);
  const time = date.toLocaleTimeString("en-GB");
  const far = Math.abs(Date.now() - date) > 20 * 3600e3;
  return withDay && far ? `${date.toLocaleDateString("en-CA")} ${time}` : time;
}

// ---- curves

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
  return found;
}

class Chart {
  constructor(parent, { label, unit, wide = false, dots = false }) {
    this.label = label; this.unit = unit; this.dots = dots;
    this.x = []; this.mean = []; this.least = []; this.largest = [];
    this.cursor = null;
    this.reading = make("output");
    this.svg = draw("svg", { role: "img", tabindex: "0" });
    this.figure = make("figure", { className: wide ? "wide" : "" },
      make("figcaption", {}, make("span", {}, label, make("span", { className: "unit" }, unit ? `  ${unit}` : "")), this.reading), this.svg);
    parent.append(this.figure);
    new ResizeObserver(() => this.draw()).observe(this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(this.nearest(event.offsetX)));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    this.svg.addEventListener("blur", () => this.point(null));
    this.svg.addEventListener("keydown", (event) => {
      const last = this.x.length - 1;
      const at = this.cursor ?? last;
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - 20, PageDown: at + 20, Home: 0, End: last }[event.key];
      if (to !== undefined) { event.preventDefault(); this.point(Math.min(last, Math.max(0, to))); }
      if (event.key === "Escape") this.point(null);
    });
  }

  point(index) { this.cursor = index; this.draw(); }

  nearest(pixel) {
    if (!this.scale || !this.x.length) return null;
    let best = 0;
    this.x.forEach((x, i) => { if (Math.abs(this.scale.x(x) - pixel) < Math.abs(this.scale.x(this.x[best]) - pixel)) best = i; });
    return best;
  }

  draw() {
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    const low = this.least.length ? this.least : this.mean, high = this.largest.length ? this.largest : this.mean;
    const finite = [...low, ...high].filter((value) => value !== null);
    this.figure.hidden = !finite.length;
    if (!finite.length || !width) return;
    let [from, to] = [Math.min(...finite), Math.max(...finite)];
    if (from === to) { const room = Math.abs(from) * 0.05 || 1; from -= room; to += room; }
    const room = (to - from) * 0.04;
    [from, to] = [from >= 0 ? Math.max(0, from - room) : from - room, to + room];
    const marks = ticks(from, to, height > 160 ? 5 : 4);
    const step = marks.length > 1 ? marks[1] - marks[0] : to - from;
    const places = [0, 1, 2, 3, 4, 5, 6, 7, 8].find((each) => Math.abs(step * 10 ** each - Math.round(step * 10 ** each)) < 1e-6) ?? 8;
    const big = Math.max(...marks.map(Math.abs), 0);
    const text = (value) => (big && big < 1e-3 ? value.toExponential(1) : big >= 1e5 ? `${(value / 1000).toLocaleString("en", { maximumFractionDigits: 2 })}k` : value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places }));
    const left = 10 + 6.7 * Math.max(1, ...marks.map((mark) => text(mark).length)), bottom = height - 18, right = width - 6, top = 8;
    const first = this.x[0], last = this.x[this.x.length - 1];
    const scale = {
      x: (value) => (last > first ? left + ((value - first) / (last - first)) * (right - left) : (left + right) / 2),
      y: (value) => bottom - ((value - from) / (to - from)) * (bottom - top),
    };
    this.scale = scale;
    const nodes = [];
    for (const mark of marks) {
      nodes.push(draw("line", { class: "grid", x1: left, x2: right, y1: scale.y(mark), y2: scale.y(mark) }));
      nodes.push(draw("text", { x: left - 6, y: scale.y(mark) + 4, "text-anchor": "end" }, text(mark)));
    }
    nodes.push(draw("text", { x: last > first ? left : (left + right) / 2, y: height - 3, "text-anchor": last > first ? "start" : "middle" }, `update ${whole.format(first)}`));
    if (last > first) nodes.push(draw("text", { x: right, y: height - 3, "text-anchor": "end" }, whole.format(last)));
    const at = (i, values) => `${scale.x(this.x[i]).toFixed(1)},${scale.y(values[i]).toFixed(1)}`;
    for (const run of this.runs()) {
      if (this.least.length && run.length > 1) {
        nodes.push(draw("path", { class: "band", d: `M${run.map((i) => at(i, this.largest)).join("L")}L${run.toReversed().map((i) => at(i, this.least)).join("L")}Z` }));
      }
      if (run.length > 1) nodes.push(draw("path", { class: "curve", d: `M${run.map((i) => at(i, this.mean)).join("L")}` }));
      if (this.dots || run.length === 1) {
        for (const i of run) nodes.push(draw("circle", { class: "dot", cx: scale.x(this.x[i]), cy: scale.y(this.mean[i]), r: 2.5 }));
      }
    }
    const value = (i) => `${digits(this.mean[i])}${this.least.length && this.least[i] !== null && this.least[i] !== this.largest[i] ? ` (${digits(this.least[i], 3)} to ${digits(this.largest[i], 3)})` : ""}`;
    const final = this.mean.findLastIndex((each) => each !== null);
    if (this.cursor !== null && this.cursor < this.x.length) {
      const i = this.cursor, x = scale.x(this.x[i]);
      nodes.push(draw("line", { class: "cross", x1: x, x2: x, y1: top, y2: bottom }));
      if (this.mean[i] !== null) nodes.push(draw("circle", { class: "dot", cx: x, cy: scale.y(this.mean[i]), r: 3.5 }));
      put(this.reading, `update ${whole.format(this.x[i])}: ${value(i)}`);
    } else put(this.reading, digits(this.mean[final]));
    this.svg.replaceChildren(...nodes);
    this.svg.setAttribute("aria-label", `${this.label}${this.unit ? ` in ${this.unit}` : ""}: ${digits(this.mean[final])} at update ${whole.format(this.x[final])}, between ${digits(Math.min(...finite))} and ${digits(Math.max(...finite))} since update ${whole.format(first)}. Arrow keys read single values.`);
  }

  runs() {
    const found = [[]];
    this.mean.forEach((value, i) => { if (value === null) found.push([]); else found[found.length - 1].push(i); });
    return found.filter((run) => run.length);
  }
}

const charts = new Map();
let updates = [];

function chart(name, group, options) {
  if (!charts.has(name)) charts.set(name, new Chart($(`charts-${group}`), options));
  return charts.get(name);
}

function takeCurves({ from, stride, updates: fresh, series }, reset) {
  if (reset) for (const each of charts.values()) if (!each.dots) each.mean = each.least = each.largest = [];
  updates = updates.slice(0, reset ? 0 : from).concat(fresh);
  const grow = (old, values) => {
    const kept = old.slice(0, from);
    while (kept.length < from) kept.push(null);  // not recorded until now
    return kept.concat(values);
  };
  for (const { name, label, unit, group, mean, least, largest } of series) {
    const each = chart(name, group, { label, unit, wide: name === "total" });
    each.x = updates;
    each.mean = grow(each.mean, mean);
    each.least = stride > 1 ? grow(each.least, least ?? mean) : [];
    each.largest = stride > 1 ? grow(each.largest, largest ?? mean) : [];
  }
  for (const each of charts.values()) if (!each.dots) each.draw();
}

// ---- the rest of the page

const VERDICTS = {
  waiting: "waiting for the run", reading: "reading the log", unreadable: "cannot be read", starting: "starting", running: "running",
  silent: "silent", died: "its process is gone", done: "done", stopped: "stopped", nonfinite: "not finite",
};
const OVER = new Set(["done", "stopped", "nonfinite", "died"]);
let cursor = "", state = null, evaluations = [], log = [], skewS = 0, pollS = 2;

const now = () => Date.now() / 1000 + skewS;

function why({ kind, heard, last_interval_s: last, usual_interval_s: usual, locked, message, share }) {
  const since = clock(heard, true);
  const between = usual === null ? "no log line came before that in this attempt"
    : `the last interval between log lines was ${duration1(last)}, the usual one ${duration1(usual)}`;
  switch (kind) {
    case "waiting": return `there is no ${message} yet; this page goes on by itself when it appears`;
    case "reading": return `${percent(share)} read`;
    case "starting": return "no log line yet: the first update is under way";
    case "silent": return `no event since: ${between}. ${locked
      ? "A process still holds the run directory: it may be evaluating, saving or stuck."
      : "No process on this machine holds the run directory."}`;
    case "died": return `nothing was logged since ${since}, and the process that held the run directory ended without a last word; continue with --resume`;
    case "done": return `the last update is done, at ${since}`;
    case "stopped": return `stopped and saved at ${since}${message ? ` (${message})` : ""}; continue with --resume`;
    default: return message;
  }
}

const duration1 = (value) => (value < 60 ? seconds(value) : duration(value));

function showStatus() {
  const { status, progress, run } = state;
  $("status").dataset.kind = status.kind;
  put($("verdict"), status.kind === "silent" ? `silent since ${clock(status.heard, true)}` : VERDICTS[status.kind]);
  put($("why"), why(status));
  const { update, updates: all, share } = progress;
  put($("update"), all ? `${whole.format(update)} of ${whole.format(all)} (${percent(share)})` : "–");
  $("bar").hidden = share === null;
  $("bar").setAttribute("aria-valuenow", (100 * (share ?? 0)).toFixed(1));
  $("bar").firstElementChild.style.width = `${100 * Math.min(1, share ?? 0)}%`;
  put($("elapsed"), duration(progress.elapsed_s) + (progress.attempt_from ? `, from update ${whole.format(progress.attempt_from)}` : ""));
  document.title = `${share === null ? "" : `${Math.floor(100 * share)}% `}${status.kind === "running" ? "" : `${VERDICTS[status.kind]} `}· ${run.name}`;
}

function showReading(status) {
  $("status").dataset.kind = status.kind;
  put($("verdict"), VERDICTS.reading);
  put($("why"), why(status));
}

function tick() {
  if (!state) return;
  const { status, progress } = state;
  const age = now() - status.heard;
  put($("heard"), status.kind === "waiting" ? "–" : `${duration(age)} ago`);
  let left = "–";
  if (OVER.has(status.kind)) left = status.kind === "done" ? "none" : "–";
  else if (progress.left_s === null) left = status.kind === "waiting" ? "–" : "not known yet";
  else if (status.kind === "silent") left = "not known: silent";
  else {
    const rest = Math.max(0, progress.left_s - age);
    left = `${duration(rest)}, until ${clock(now() + rest, true)}`;
  }
  put($("left"), left);
}

function showFacts() {
  const { run } = state;
  const some = (value, text) => (value === null || value === undefined || value === "" ? [] : [text(value)]);
  put($("name"), run.name);
  put($("facts"), [
    ...some(run.device_name ?? run.processor ?? run.device, String),
    ...some(run.precision, String),
    ...some(run.ranks, (ranks) => (ranks === 1 ? "1 rank" : `${ranks} ranks (${run.engine}, ${run.nodes} node${run.nodes === 1 ? "" : "s"}, ${run.rings} ring${run.rings === 1 ? "" : "s"})`)),
    ...(run.compression && run.compression !== "none" ? [`compression ${run.compression}`] : []),
    ...some(run.student_parameters, (count) => `student ${digits(count / 1e6, 3)} M parameters`),
    ...(run.teacher_parameters ? [`teacher ${digits(run.teacher_parameters / 1e6, 3)} M`] : []),
  ].join(" · "));
  put($("where"), `${run.directory}${run.host ? ` on ${run.host}` : ""}`);
}

function tile(label, big, more = "") {
  return make("div", {}, make("dt", {}, label), make("dd", { className: "big" }, big), make("dd", { className: "more" }, more));
}

function showTiles() {
  const { speed, progress } = state;
  const { latest, mfu } = speed;
  const share = mfu?.student;
  const mfuText = mfu?.refused ? "refused" : mfu ? percent(share) : "not recorded";
  const mfuMore = mfu?.refused ? mfu.refused : mfu?.peak_source ? `of ${digits(mfu.peak_flops / 1e12, 3)} TFLOP/s, ${mfu.peak_source}` : "";
  const skipped = latest.skipped_in_all ?? 0;
  $("tiles").replaceChildren(
    tile("total loss", digits(latest.total), skipped ? `${whole.format(skipped)} updates skipped: not finite` : ""),
    tile("tokens/s, all ranks", digits(speed.tokens_per_s), speed.tokens_per_s === null ? "" : `over ${speed.lines} log line${speed.lines === 1 ? "" : "s"}`),
    tile("step, median", speed.step_p50_s === null ? "not recorded" : seconds(speed.step_p50_s), speed.step_p95_s === null ? "" : `95th percentile ${seconds(speed.step_p95_s)}, ${speed.steps} steps`),
    tile("waiting for data", percent(speed.data_wait_share), ""),
    tile("MFU of the student", mfuText, mfuMore),
    tile("tokens", progress.tokens === null ? "–" : digits(progress.tokens), "of the updates logged"),
  );
}

function showPhases() {
  const { phases } = state;
  if (!phases) { $("phases").replaceChildren(make("p", { className: "muted" }, "not recorded")); return; }
  const names = Object.keys(phases.seconds);  // in a step's order, "other" last
  const colour = (name) => `var(--${PHASES.has(name) ? name : "other"})`;
  const stack = make("div", { className: "stack" });
  stack.setAttribute("aria-hidden", "true");
  const legend = make("ul", { className: "legend" });
  for (const name of names) {
    const value = phases.seconds[name], share = value / phases.step_s;
    const piece = make("div");
    piece.style.flex = `${Math.max(share, 0)} 0 0`;
    piece.style.background = colour(name);
    stack.append(piece);
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = colour(name);
    legend.append(make("li", {}, swatch, make("span", {}, PHASES.get(name) ?? name), make("span", {}, seconds(value)), make("span", {}, percent(share))));
  }
  const beside = phases.communication_s === null ? "" : ` Communication runs for ${seconds(phases.communication_s)} of it, beside the backward pass.`;
  $("phases").replaceChildren(stack, legend, make("p", { className: "note" }, `Rank 0, mean of ${phases.updates} updates, ${seconds(phases.step_s)} each.${beside}`));
}

function row(cells, kind = "td", className = "") {
  return make("tr", { className }, ...cells.map((cell) => {
    const far = cell?.far, content = far ? cell.text : cell;
    const node = make(kind, { className: far ? "far" : "" }, content);
    if (kind === "th") node.scope = "col";
    return node;
  }));
}

const far = (text) => ({ far: true, text });

function showRanks() {
  const { ranks, run, status } = state;
  if (!ranks) { $("ranks").replaceChildren(make("p", { className: "muted" }, run.ranks > 1 ? "no log line yet" : run.ranks === 1 ? "one rank" : "–")); return; }
  const most = Math.max(...ranks.map((each) => each.worked_s ?? 0));
  const table = make("table", {}, make("thead", {}, row(["rank", "own work", "of the mean", far("tokens"), far("waits for data"), "slowest in", "state"], "th")));
  const body = make("tbody");
  for (const each of ranks) {
    const meter = make("span", { className: "meter far" }, make("div"));
    meter.firstElementChild.style.width = `${most > 0 ? (100 * (each.worked_s ?? 0)) / most : 0}%`;
    const worked = each.worked_s === null ? "not recorded" : make("span", {}, seconds(each.worked_s), meter);
    body.append(row([
      String(each.rank), worked, each.of_mean === null ? "–" : `${each.of_mean.toFixed(2)}×`, far(percent(each.tokens_share)),
      far(each.data_wait_s === null ? "–" : seconds(each.data_wait_s)), percent(each.slowest_share), each.slow ? "▲ slow" : each.worked_s === null ? "–" : "even",
    ], "td", each.slow ? "slow" : ""));
  }
  table.append(body);
  const scroll = make("div", { className: "scroll", tabIndex: 0 }, table);
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Ranks");
  $("ranks").replaceChildren(scroll, make("p", { className: "note" },
    `Own work: seconds an update, waits for other ranks left out, over ${state.speed.lines} log lines. Every update needs all ranks: all ${ranks.length} were alive at ${clock(status.heard, true)}.`));
}

function facts(entries) {
  return make("dl", { className: "facts wrapped" }, ...entries.map(([label, text, className = ""]) => make("div", {}, make("dt", {}, label), make("dd", { className }, text))));
}

function showDevice() {
  const { device } = state;
  if (!device) { $("device").replaceChildren(); return; }
  const has = (value) => value !== null && value !== undefined;
  const known = [
    ["utilisation", "utilisation", percent],
    ["sm_clock_mhz", "SM clock, median", (value) => `${digits(value)} MHz`],
    ["sm_clock_min_mhz", "SM clock, lowest", (value) => `${digits(value)} MHz`],
    ["memory_clock_mhz", "memory clock", (value) => `${digits(value)} MHz`],
    ["clock_mhz", "clock", (value) => `${digits(value)} MHz`],
    ["power_w", "power", (value) => `${digits(value, 3)} W`],
    ["temperature_c", "temperature", (value) => `${digits(value, 3)} °C`],
    ["pcie_tx_bytes_per_s", "PCIe out", (value) => `${bytes(value)}/s`],
    ["pcie_rx_bytes_per_s", "PCIe in", (value) => `${bytes(value)}/s`],
  ];
  const entries = known.filter(([name]) => has(device[name])).map(([name, label, text]) => [label, text(device[name])]);
  if (device.throttled && typeof device.throttled === "object") {
    const reasons = Object.entries(device.throttled).filter(([, share]) => share > 0);
    entries.push(["throttled", reasons.length ? `▲ ${reasons.map(([reason, share]) => `${reason}: ${percent(share)} of samples`).join(", ")}` : "no", reasons.length ? "warned" : ""]);
  }
  $("device").replaceChildren(facts(entries));
}

function showMemory() {
  const { memory: values, run } = state;
  const of = (value, all) => (Number.isFinite(all) && all > 0 ? `${bytes(value)} of ${bytes(all)} (${percent(value / all)})` : bytes(value));
  const known = [
    ["used_bytes", "device, used by all", (value) => of(value, run.device_memory_bytes)],
    ["reserved_bytes", "reserved by torch", bytes], ["allocated_bytes", "allocated", bytes],
    ["peak_allocated_bytes", "allocated at most", (value) => of(value, run.device_memory_bytes)], ["fragmented_bytes", "reserved beyond what was allocated", bytes],
    ["outside_bytes", "used outside torch", bytes],
    ["rss_bytes", "host (RSS)", (value) => of(value, run.host_memory_bytes)], ["peak_rss_bytes", "host at most", bytes],
  ];
  const entries = known.filter(([name]) => Number.isFinite(values[name])).map(([name, label, text]) => [label, text(values[name])]);
  for (const [name, label] of [["retries", "allocation retries"], ["ooms", "out of memory"]]) {
    if (values[name] > 0) entries.push([label, `▲ ${whole.format(values[name])}`, "warned"]);
  }
  $("memory").replaceChildren(entries.length ? facts(entries) : make("p", { className: "muted" }, "not recorded"));
}

function showEvaluations() {
  $("held-out").hidden = !evaluations.length;
  const numeric = (value) => (typeof value === "number" ? value : null);
  for (const [name, label] of [["loss", "Held-out loss"], ["kl", "Held-out KL to the teacher"]]) {
    const found = evaluations.filter((each) => numeric(each[name]) !== null);
    if (!found.length && !charts.has(`held-${name}`)) continue;
    const each = chart(`held-${name}`, "heldout", { label, unit: "", dots: true });
    each.x = found.map((one) => one.update);
    each.mean = found.map((one) => one[name]);
    const errors = found.map((one) => numeric(one[`${name}_se`]) ?? 0);
    const known = errors.some((error) => error > 0);
    each.least = known ? each.mean.map((value, i) => value - errors[i]) : [];
    each.largest = known ? each.mean.map((value, i) => value + errors[i]) : [];
    each.draw();
  }
  const head = make("thead", {}, row(["update", "loss", far("± standard error"), "perplexity", "KL", far("took"), "at"], "th"));
  const body = make("tbody", {}, ...evaluations.slice(-50).toReversed().map((one) => row([
    whole.format(one.update), digits(one.loss), far(digits(one.loss_se, 2)), digits(one.perplexity), digits(one.kl), far(seconds(one.seconds)), clock(one.time, true),
  ])));
  $("evaluations").replaceChildren(head, body);
}

function showLog() {
  const bad = new Set(["nonfinite", "unreadable"]);
  $("log").replaceChildren(...(log.length ? log.toReversed().map((entry) => make("li", {},
    make("span", { className: "when" }, clock(entry.time, true)),
    make("span", { className: bad.has(entry.kind) ? "bad" : "" }, entry.kind),
    make("span", { className: "at" }, entry.update === null ? "" : `update ${whole.format(entry.update)}`),
    make("span", { className: "text" }, entry.text),
  )) : [make("li", { className: "muted" }, "nothing yet")]));
}

function take(answer) {
  pollS = answer.poll_s;
  if (answer.status.kind === "reading") { showReading(answer.status); return; }
  if (answer.reset) [evaluations, log] = [[], []];
  const fresh = answer.reset || answer.evaluations.length, entries = answer.reset || answer.log.length;
  evaluations.push(...answer.evaluations);
  log = log.concat(answer.log).slice(-KEPT_LOG);
  state = answer;
  cursor = answer.cursor;
  skewS = answer.now - Date.now() / 1000;
  showFacts(); showStatus(); tick(); showTiles(); showPhases(); showRanks(); showDevice(); showMemory();
  takeCurves(answer.curves, answer.reset);
  if (fresh) showEvaluations();
  if (entries) showLog();
  document.body.dataset.cursor = cursor;
}

// ---- asking

let timer = 0, asking = false;

function lost(text) {
  $("lost").hidden = !text;
  put($("lost"), text);
}

async function ask() {
  clearTimeout(timer);
  if (asking || document.hidden) return;
  asking = true;
  let waitS = 5;
  try {
    const answer = await fetch(`/api/state?since=${encodeURIComponent(cursor)}`, { cache: "no-store", signal: AbortSignal.timeout(15000) });
    if (answer.status === 200) take(await answer.json());
    else if (answer.status !== 204) throw new Error(await answer.text());
    lost("");
    waitS = pollS;
  } catch (error) {
    lost(`fastdistil watch gives no answer (${String(error.message).trim()}); what is shown may be old. Trying again.`);
  }
  asking = false;
  timer = setTimeout(ask, 1000 * waitS);
}

document.addEventListener("visibilitychange", ask);
setInterval(tick, 1000);
ask();
