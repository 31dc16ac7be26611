"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const MOST_SHOWN = 30;
  const MOST_EVENTS = 500;
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const everyMs = () => (calm.matches ? 5000 : 1000);

  // --- what is known ----------------------------------------------------------------------------------------

  const known = { instance: "", look: 0, now: 0, reply: null, traces: new Map(), traffic: [], events: [] };

  function forget(instance) {
    Object.assign(known, { instance, look: 0, reply: null, traces: new Map(), traffic: [], events: [] });
  }

  /** Take a reply in; returns the events that are news, null when the past was read as well. */
  function learn(reply) {
    const first = known.look === 0;
    known.reply = reply;
    known.look = reply.look;
    known.now = reply.now_s;
    const from = reply.now_s - reply.window_s;
    for (const name of [...known.traces.keys()]) if (!(name in reply.traces)) known.traces.delete(name);
    for (const [name, t] of Object.entries(reply.traces)) {
      const old = known.traces.get(name) || { losses: [], segments: [], marks: [] };
      known.traces.set(name, {
        present: t.present,
        losses: old.losses.concat(t.losses),
        segments: old.segments.concat(t.segments).filter((s) => s[2] >= from),
        marks: old.marks.concat(t.marks).filter((m) => m[1] >= from),
      });
    }
    known.traffic.push(...reply.traffic);
    known.events = known.events.concat(reply.events).slice(-MOST_EVENTS);
    return first ? null : reply.events;
  }

  // --- asking -----------------------------------------------------------------------------------------------

  let token = tokenOfAddress() || sessionStorage.getItem("loscar-token") || "";
  let timer = 0;
  let paused = false;
  let asking = false;
  let lastAnswer = 0;

  function tokenOfAddress() {
    const given = new URLSearchParams(location.hash.slice(1)).get("token");
    if (given !== null) history.replaceState(null, "", location.pathname);
    return given;
  }

  async function ask() {
    clearTimeout(timer);
    if (asking || paused || document.hidden) return;
    asking = true;
    try {
      await askOnce();
    } finally {
      asking = false;
    }
    clearTimeout(timer);
    if ($("ask").hidden) timer = setTimeout(ask, everyMs());
  }

  async function askOnce() {
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    try {
      const answer = await fetch(`state.json?since=${known.look}`, { headers, signal: AbortSignal.timeout(10000) });
      if (paused) return;
      if (answer.status === 401) return wantToken();
      if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
      const reply = await answer.json();
      if (paused) return;
      if (reply.instance !== known.instance && known.look > 0) {
        forget(reply.instance);
        return askOnce();
      }
      known.instance = reply.instance;
      lastAnswer = Date.now();
      if (token) sessionStorage.setItem("loscar-token", token);
      if (reply.run) {
        const news = learn(reply);
        show();
        if (news) announce(news);
      }
      connected(calm.matches ? "live, every 5 s" : "live, every second", false);
    } catch (error) {
      if (paused) return;
      const since = lastAnswer ? ` What is shown is of ${clock(lastAnswer / 1000)}.` : "";
      connected(`No answer from the server.${since} Trying again.`, true);
    }
  }

  function connected(text, bad) {
    const line = $("connection");
    if (bad && !line.classList.contains("bad")) say(text);
    if (!bad && line.classList.contains("bad")) say("The server answers again.");
    line.className = bad ? "bad" : "muted";
    put(line, text);
  }

  function wantToken() {
    const wrong = token !== "";
    token = "";
    sessionStorage.removeItem("loscar-token");
    $("page").hidden = $("pause").hidden = true;
    $("ask").hidden = false;
    put($("refused"), wrong ? "That is not this run's token." : "");
    connected("a token is needed", false);
    $("token").focus();
  }

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    token = $("token").value.trim();
    $("token").value = "";
    $("ask").hidden = true;
    forget("");
    ask();
  });
  $("pause").addEventListener("click", () => {
    paused = !paused;
    $("pause").setAttribute("aria-pressed", String(paused));
    put($("pause"), paused ? "Go on" : "Pause updates");
    if (paused) {
      clearTimeout(timer);
      connected(`paused at ${clock(lastAnswer / 1000)}`, false);
    } else ask();
  });
  document.addEventListener("visibilitychange", () => document.hidden || ask());
  addEventListener("hashchange", () => {
    const given = tokenOfAddress();
    if (given) {
      token = given;
      forget("");
      ask();
    }
  });

  // --- words ------------------------------------------------------------------------------------------------

  const NONE = "–";
  const pad = (n) => String(n).padStart(2, "0");
  const whole = (n) => Math.round(n).toLocaleString("en");
  const percent = (share) => (share === null ? NONE : `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`);
  const clock = (s) => {
    const t = new Date(s * 1000);
    return `${pad(t.getHours())}:${pad(t.getMinutes())}:${pad(t.getSeconds())}`;
  };

  function size(bytes) {
    for (const unit of ["B", "kB", "MB", "GB", "TB"]) {
      if (bytes < 1000 || unit === "TB") return `${unit === "B" || bytes >= 100 ? Math.round(bytes) : bytes.toFixed(1)} ${unit}`;
      bytes /= 1000;
    }
  }

  function span(s, bare = false) {
    if (s < 1) return `${Math.round(s * 1000)} ms`;
    if (s < 60) return `${Number(s.toFixed(s < 10 ? 1 : 0))} s`;
    const m = Math.floor(s / 60);
    if (bare && s % 60 === 0) return m % 60 ? `${m} min` : `${m / 60} h`;
    return m < 60 ? `${m}:${pad(Math.floor(s % 60))} min` : `${Math.floor(m / 60)}:${pad(m % 60)} h`;
  }

  const delay = (s) => {
    if (s === null) return NONE;
    return s < 1 ? `${Number((s * 1000).toPrecision(2))} ms` : span(s);
  };

  const byName = (a, b) => a.localeCompare(b, "en", { numeric: true });
  /** Going is no bad news in itself. */
  const wanted = (e) => e.reason === "finished" || e.reason === "left";
  const figure = (n) => (n === null ? NONE : String(Number(n.toPrecision(n < 1 ? 3 : 4))));

  const EXCHANGE = {
    none: "not in the open round",
    awaited: "contribution awaited",
    arriving: "contribution partly here",
    whole: "contribution here",
    joining: "joining",
    suspended: "suspended: it missed a round",
    silent: "silent",
  };

  function sentence(e) {
    switch (e.kind) {
      case "joined": return [e.name, "joined", e.observer ? " as an observer" : ` at slot ${e.slot}`];
      case "returned": return [e.name, "came back", e.observer ? " as an observer" : ` at slot ${e.slot}`];
      case "left": return [e.name, "left", `: ${e.text} (${e.reason}${e.detail ? `: ${e.detail}` : ""})`];
      case "suspended": return [e.name, "suspended", ": a round was closed without it"];
      case "resumed": return [e.name, "takes part again", ""];
      default: return ["", `the run is ${e.phase}`, e.detail ? `: ${e.detail}` : ""];
    }
  }

  // --- saying things without eyes ---------------------------------------------------------------------------

  const unsaid = [];
  let quietUntil = 0;

  function announce(events) {
    for (const e of events) {
      const [name, verb, rest] = sentence(e);
      unsaid.push(`${name} ${verb}${rest}`.trim());
    }
    speak();
  }

  function say(text) {
    unsaid.push(text);
    speak();
  }

  /** No more often than every five seconds, and no long lists: a screen reader reads all of it. */
  function speak() {
    if (!unsaid.length) return;
    const wait = quietUntil - Date.now();
    if (wait > 0) {
      setTimeout(speak, wait + 10);
      return;
    }
    quietUntil = Date.now() + 5000;
    const found = unsaid.splice(0);
    const more = found.length > 3 ? `; and ${found.length - 3} more events` : "";
    $("announce").textContent = found.slice(0, 3).join("; ") + more;
  }

  // --- elements ---------------------------------------------------------------------------------------------

  function put(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  function make(tag, attributes = {}, ...children) {
    const svg = ["svg", "path", "line", "text", "polyline"].includes(tag);
    const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  /** One child of `parent` for each key, in order, made once. */
  function keyed(parent, keys, build) {
    const there = parent.keyed || (parent.keyed = new Map());
    for (const [key, element] of there) {
      if (!keys.includes(key)) {
        element.remove();
        there.delete(key);
      }
    }
    keys.forEach((key, i) => {
      let element = there.get(key);
      if (!element) there.set(key, (element = build(key)));
      if (parent.children[i] !== element) parent.insertBefore(element, parent.children[i] || null);
    });
    return there;
  }

  // --- the parts of the page --------------------------------------------------------------------------------

  function show() {
    $("ask").hidden = true;
    $("page").hidden = $("pause").hidden = false;
    const { run } = known.reply;
    document.title = `${run.phase} · round ${run.round} · LOSCAR`;
    put($("run-id"), `run ${run.run_id.slice(0, 8)}`);
    put($("beat"), span(run.heartbeat_s));
    showHeadline(run);
    showLanes();
    showLosses();
    showTraffic();
    showLinks();
    showEvents();
  }

  function showHeadline(run) {
    const m = run.members;
    const there = m.active + m.joining + m.suspended;
    const aside = [
      m.joining && `${m.joining} joining`,
      m.suspended && `${m.suspended} suspended`,
      m.observer && `${m.observer} observing`,
    ].filter(Boolean);
    const wanted = run.phase === "waiting" && run.workers_wanted ? `${there} of ${run.workers_wanted} are there` : "";
    const share = run.dimension && run.coordinates ? percent(run.coordinates / run.dimension) : "";
    const carried = share && `each carries ${share} of ${whole(run.dimension)}`;
    const flow = (rate, total) => [rate === null ? NONE : `${size(rate)}/s`, `${size(total)} in all`];
    const tiles = {
      Phase: [run.phase, run.stop_reason || wanted],
      Round: [whole(run.round), carried],
      Epoch: [whole(run.epoch), run.epoch > 1 ? "the server was replaced" : ""],
      "Active workers": [whole(m.active), aside.join(", ")],
      "Run time": [run.elapsed_s < 0 ? "not begun" : span(run.elapsed_s), `method ${run.method}`],
      "Rounds/s": [run.rounds_per_s === null ? NONE : run.rounds_per_s.toFixed(2), "over 15 s"],
      "From workers": flow(run.bytes_in_per_s, run.bytes_in),
      "To workers": flow(run.bytes_out_per_s, run.bytes_out),
    };
    const made = keyed($("headline"), Object.keys(tiles), (name) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, make("span"), make("small"))));
    for (const [name, [value, note]] of Object.entries(tiles)) {
      const dd = made.get(name).lastChild;
      put(dd.firstChild, value);
      put(dd.lastChild, note || "");
      dd.lastChild.hidden = !note;
    }
  }

  const departure = (name) => known.events.findLast((e) => e.kind === "left" && e.name === name);

  function showLanes() {
    const from = known.now - known.reply.window_s;
    const workers = new Map(known.reply.workers.filter((w) => w.state !== "observer").map((w) => [w.name, w]));
    const gone = [...known.traces].filter(([name, t]) => !workers.has(name) && t.marks.length).map(([name]) => name);
    const names = [...workers.keys(), ...gone].sort(byName);
    $("no-lanes").hidden = names.length > 0;
    const made = keyed($("lanes"), names, (name) =>
      make("div", { class: "lane" }, make("h3", {}, name), make("p"), make("canvas", { "aria-hidden": "true" })));
    for (const name of names) {
      const [, text, canvas] = made.get(name).children;
      const worker = workers.get(name);
      const trace = known.traces.get(name) || { segments: [], marks: [] };
      const left = worker ? null : departure(name);
      put(text, worker ? doing(worker, trace) : left ? `left at ${clock(left.time)}: ${left.reason}` : "left");
      text.className = left && !wanted(left) ? "bad" : "";
      drawLane(canvas, trace, from, left);
    }
  }

  function doing(worker, trace) {
    const last = trace.segments.at(-1);
    const words = [];
    if (last && worker.exchange !== "silent") {
      words.push(`computing ${percent(1 - last[3])}, waiting ${percent(last[3])}`);
      const merged = trace.segments.reduce((sum, s) => sum + (s[2] > known.now - 60 ? s[5] : 0), 0);
      words.push(`${merged} merged in 1 min`);
    }
    words.push(worker.exchange === "silent" ? `silent for ${span(worker.heard_ago_s)}` : EXCHANGE[worker.exchange]);
    return words.join(" · ");
  }

  const UPPER = 26;
  const LOWER = 14;
  const GAP = 4;

  function drawLane(canvas, trace, from, left) {
    const width = canvas.clientWidth;
    const height = UPPER + GAP + LOWER;
    if (!width) return;
    const scale = devicePixelRatio || 1;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const c = canvas.getContext("2d");
    c.scale(scale, scale);
    const x = (t) => Math.round((((t - from) / (known.now - from)) * width) * scale) / scale;
    c.fillStyle = colour("off");
    c.fillRect(0, 0, width, UPPER);
    c.fillRect(0, UPPER + GAP, width, LOWER);
    const hatch = (x0, y0, w, h, ink, step, slope) => {
      c.save();
      c.beginPath();
      c.rect(x0, y0, w, h);
      c.clip();
      c.strokeStyle = ink;
      c.lineWidth = 2;
      c.beginPath();
      const first = Math.floor((x0 - h) / step) * step;
      for (let at = first; at < x0 + w + h; at += step) {
        c.moveTo(at, y0 + (slope > 0 ? h : 0));
        c.lineTo(at + (slope ? h : 0), y0 + (slope > 0 ? 0 : h));
      }
      c.stroke();
      c.restore();
    };
    for (const [, begin, end, waiting, , merged] of trace.segments) {
      const x0 = Math.max(0, x(begin));
      const x1 = x(end);
      c.fillStyle = colour("compute");
      c.fillRect(x0, 0, x1 - x0, UPPER);
      if (waiting > 0) {
        c.fillStyle = colour("card");
        c.fillRect(x0, 0, x1 - x0, UPPER * waiting);
        hatch(x0, 0, x1 - x0, UPPER * waiting, colour("wait"), 4, 1);
      }
      c.fillStyle = colour("merge");
      const ticks = Math.min(merged, Math.max(1, Math.floor((x1 - x0) / 3)));
      for (let i = 0; i < ticks; i++) c.fillRect(x0 + ((i + 0.5) / ticks) * (x1 - x0), UPPER - 7, 1, 7);
    }
    const marks = trace.marks;
    for (let i = 0; i < marks.length; i++) {
      const [, at, code] = marks[i];
      const next = i + 1 < marks.length ? marks[i + 1][1] : at + 1;
      const x0 = Math.max(0, x(at - 1));
      const w = Math.max(1, x(Math.min(next, at + 2) - 1) - x0);
      const y = UPPER + GAP;
      if (code === "awaited") {
        c.fillStyle = colour("awaited");
        c.fillRect(x0, y + LOWER / 2 - 2, w, 4);
      } else if (code === "whole") {
        c.fillStyle = colour("whole");
        c.fillRect(x0, y, w, LOWER);
      } else if (code === "arriving") {
        hatch(x0, y, w, LOWER, colour("arriving"), 3, 0);
      } else if (code === "joining" || code === "suspended") {
        hatch(x0, y, w, LOWER, colour("aside"), 6, -1);
      } else if (code === "silent") {
        c.fillStyle = colour("silent");
        for (let d = x0; d < x0 + w; d += 4) c.fillRect(d, y + LOWER / 2 - 1, 2, 2);
      }
    }
    if (left && left.at_s >= from) {
      const at = Math.min(width - 6, Math.max(6, x(left.at_s)));
      c.strokeStyle = colour(wanted(left) ? "ink" : "bad");
      c.lineWidth = 2.5;
      c.beginPath();
      c.moveTo(at - 5, height / 2 - 5);
      c.lineTo(at + 5, height / 2 + 5);
      c.moveTo(at + 5, height / 2 - 5);
      c.lineTo(at - 5, height / 2 + 5);
      c.stroke();
    }
  }

  // --- charts -----------------------------------------------------------------------------------------------

  const looks = new Map();
  /** A colour and a dash that stay a series' own. */
  const look = (name) => {
    if (!looks.has(name)) looks.set(name, looks.size);
    const i = looks.get(name);
    return `c${i % 6} d${i % 4}`;
  };

  const SECONDS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400];

  /** Round values, about `count` of them, from low to high. */
  function ticks(low, high, count, seconds) {
    const rough = (high - low) / count || 1;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const usual = [1, 2, 5, 10].map((f) => f * unit).find((s) => s >= rough);
    const step = (seconds && SECONDS.find((s) => s >= rough)) || usual;
    const found = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) found.push(v);
    return found;
  }

  /** 1, 2 and 5 times powers of ten, or powers of ten alone where there are many. */
  function logTicks(low, high) {
    const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    const factors = last - first > 3 ? [1] : [1, 2, 5];
    const found = [];
    for (let e = first; e <= last; e++) for (const f of factors) found.push(f * 10 ** e);
    return found.filter((v) => v >= low && v <= high);
  }

  /** Curves of [x, y] points with a legend; arrow keys and the pointer read values off. */
  function chart(holder, label, series, words) {
    let parts = holder.parts;
    if (!parts) {
      parts = holder.parts = {
        svg: make("svg", { tabindex: "0", role: "img" }), read: make("p", { class: "read muted" }), key: make("ul"), at: null,
      };
      holder.append(parts.svg, parts.read, parts.key);
      const move = (event) => {
        const box = parts.svg.getBoundingClientRect();
        parts.at = parts.back ? parts.back(event.clientX - box.left) : null;
        holder.draw();
      };
      parts.svg.addEventListener("pointermove", move);
      parts.svg.addEventListener("pointerdown", move);
      for (const away of ["pointerleave", "blur"]) parts.svg.addEventListener(away, () => { parts.at = null; holder.draw(); });
      parts.svg.addEventListener("keydown", (event) => {
        const [low, high] = parts.range || [0, 1];
        const step = (high - low) / 40;
        const at = parts.at === null ? high : parts.at;
        const to = { ArrowLeft: at - step, ArrowRight: at + step, Home: low, End: high }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        parts.at = Math.min(high, Math.max(low, to));
        holder.draw();
      });
    }
    holder.draw = () => drawChart(parts, label, series, words);
    holder.draw();
  }

  function drawChart(parts, label, series, words) {
    const { svg } = parts;
    const width = svg.clientWidth || 300;
    const height = svg.clientHeight || 240;
    const drawn = series.filter((s) => s.points.length);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const all = drawn.flatMap((s) => s.points);
    if (!all.length) {
      svg.replaceChildren(make("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing yet"));
      svg.setAttribute("aria-label", `${label}: nothing yet`);
      parts.key.replaceChildren();
      parts.key.keyed = null;
      parts.back = null;
      put(parts.read, "");
      return;
    }
    const xs = all.map((p) => p[0]);
    const ys = all.map((p) => p[1]);
    const least = (values) => values.reduce((a, b) => Math.min(a, b));
    const most = (values) => values.reduce((a, b) => Math.max(a, b));
    const [x0, x1] = [least(xs), Math.max(most(xs), least(xs) + 1)];
    const bottom = words.zero ? 0 : least(ys);
    const top = Math.max(most(ys), bottom + Math.abs(bottom) * 1e-3 + 1e-9);
    const room = (top - bottom) * 0.05;
    const log = words.log && least(ys) > 0 && top > 10 * bottom;
    const [y0, y1] = log ? [bottom / 1.15, top * 1.15] : [words.zero ? 0 : bottom - room, top + room];
    const lines = log ? logTicks(y0, y1) : ticks(y0, y1, 4);
    const texts = lines.map((v) => words.y(Number(v.toPrecision(6))));
    const box = { left: 14 + 7 * most(texts.map((t) => t.length)), right: width - 16, top: 10, bottom: height - 24 };
    const x = (v) => box.left + ((v - x0) / (x1 - x0)) * (box.right - box.left);
    const up = (v) => (log ? Math.log(v / y0) / Math.log(y1 / y0) : (v - y0) / (y1 - y0));
    const y = (v) => box.bottom - up(v) * (box.bottom - box.top);
    parts.range = [x0, x1];
    parts.back = (px) => Math.min(x1, Math.max(x0, x0 + ((px - box.left) / (box.right - box.left)) * (x1 - x0)));
    const found = [];
    lines.forEach((v, i) => {
      found.push(make("line", { class: "grid", x1: box.left, x2: box.right, y1: y(v), y2: y(v) }));
      found.push(make("text", { x: box.left - 6, y: y(v) + 4, "text-anchor": "end" }, texts[i]));
    });
    for (const v of ticks(x0, x1, Math.max(2, Math.floor(width / 110)), true)) {
      found.push(make("text", { x: x(v), y: height - 6, "text-anchor": "middle" }, span(v, true)));
    }
    for (const s of drawn) {
      const line = s.points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ");
      found.push(make("polyline", { class: `curve ${look(s.name)}`, points: line }));
    }
    if (parts.at !== null) {
      found.push(make("line", { class: "cursor", x1: x(parts.at), x2: x(parts.at), y1: box.top, y2: box.bottom }));
    }
    svg.replaceChildren(...found);
    const latest = drawn.slice(0, 8).map((s) => `${s.name} ${words.y(s.points.at(-1)[1])}`).join(", ");
    svg.setAttribute("aria-label", `${label}${log ? ", logarithmic" : ""}. Latest: ${latest}. Arrow keys read earlier values.`);
    const near = (s) => s.points.reduce((a, b) => (Math.abs(b[0] - parts.at) < Math.abs(a[0] - parts.at) ? b : a));
    const values = (s) => `${s.name} ${words.y((parts.at === null ? s.points.at(-1) : near(s))[1])}`;
    const hint = "Point at the chart, or use the arrow keys on it, to read values.";
    const more = drawn.length > 6 ? ", …" : "";
    put(parts.read, parts.at === null ? hint
      : `${span(parts.at)}: ${drawn.slice(0, 6).map(values).join(", ")}${more}`);
    const focused = document.activeElement === svg && parts.at !== null;
    parts.read.setAttribute("aria-live", focused ? "polite" : "off");
    const key = keyed(parts.key, drawn.map((s) => s.name), (name) => make("li", {},
      make("svg", { viewBox: "0 0 28 10", "aria-hidden": "true" },
        make("line", { class: `curve ${look(name)}`, x1: 0, x2: 28, y1: 5, y2: 5 })), make("span")));
    for (const s of drawn) put(key.get(s.name).lastChild, `${s.name} ${words.y(s.points.at(-1)[1])}${s.note || ""}`);
  }

  function showLosses() {
    const series = [...known.traces].filter(([, t]) => t.losses.length)
      .map(([name, t]) => ({ name, points: t.losses.map((p) => [p[1], p[2]]), note: t.present ? "" : " (left)" }))
      .sort((a, b) => byName(a.name, b.name));
    chart($("loss"), "Training loss by worker over run time", series, { y: figure, log: true });
  }

  function showTraffic() {
    const rate = (column) => known.traffic.slice(1).map((p, i) => {
      const before = known.traffic[i];
      return [p[1], (p[column] - before[column]) / Math.max(0.1, p[1] - before[1])];
    });
    chart($("traffic"), "Traffic over time", [
      { name: "from workers", points: rate(2) }, { name: "to workers", points: rate(3) },
    ], { y: (v) => `${size(v).replace(".0 ", " ")}/s`, zero: true });
  }

  const COLUMNS = {
    worker: (w) => w.name,
    state: (w) => (w.exchange === "silent" ? "silent" : w.state),
    steps: (w) => whole(w.steps),
    loss: (w) => figure(w.loss),
    waiting: (w) => percent(w.idle_share),
    "rounds behind": (w) => (w.behind === null ? NONE : w.behind ? `≤ ${whole(w.behind)}` : "0"),
    overlap: (w) => `${w.overlap_steps} steps`,
    "round trip": (w) => delay(w.round_trip_s),
    cycle: (w) => (w.cycle_s ? span(w.cycle_s) : NONE),
    deadline: (w) => span(w.deadline_s),
    contributed: (w) => whole(w.contributed),
    missed: (w) => whole(w.missed),
    up: (w) => size(w.bytes_up),
    down: (w) => size(w.bytes_down),
    heard: (w) => `${span(w.heard_ago_s)} ago`,
  };

  function showLinks() {
    const names = Object.keys(COLUMNS);
    const [head, body] = [$("links").tHead.rows[0], $("links").tBodies[0]];
    keyed(head, names, (name) => make("th", { scope: "col", role: "columnheader" }, name));
    const workers = known.reply.workers;
    const made = keyed(body, workers.map((w) => w.name), () =>
      make("tr", { role: "row" }, make("th", { scope: "row", role: "rowheader" }),
        ...names.slice(1).map((name) => make("td", { role: "cell", "data-label": name }, make("span")))));
    for (const w of workers) {
      const cells = made.get(w.name).children;
      names.forEach((name, i) => put(i ? cells[i].firstChild : cells[i], COLUMNS[name](w)));
    }
    $("links").hidden = !workers.length;
    $("no-links").hidden = workers.length > 0;
    const more = $("hidden-workers");
    more.hidden = !known.reply.hidden;
    put(more, `${known.reply.hidden} more members are not shown one by one.`);
  }

  function showEvents() {
    const shown = known.events.slice(-MOST_SHOWN).reverse();
    for (const e of shown) e.key = e.key || `${e.time} ${e.kind} ${e.name || e.phase}`;
    keyed($("events"), shown.map((e) => e.key), (key) => {
      const e = shown.find((found) => found.key === key);
      const [name, verb, rest] = sentence(e);
      const kind = { joined: "joined", returned: "joined", left: wanted(e) ? "" : "left" }[e.kind] || "";
      const text = make("span", {}, name ? `${name} ` : "", make("b", { class: kind }, verb), rest,
        make("span", { class: "muted" }, ` · round ${whole(e.round)}`));
      return make("li", {}, make("time", { datetime: new Date(e.time * 1000).toISOString() }, clock(e.time)), text);
    });
    const older = known.events.length - shown.length;
    $("older").hidden = older <= 0;
    put($("older"), `${older} older ones are not shown; loscar server --events keeps all of them in a file.`);
  }

  let sized = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(sized);
    sized = requestAnimationFrame(() => known.reply && !$("page").hidden && show());
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => known.reply && show());
  ask();
})();
