// Draws what the server reports. Whatever comes from a client or a model is set as text, never as markup.
"use strict";

const MOST_SHOWN = 100; // flagged images in the list
const MOST_BARS = 100; // of a histogram; a sidecar of guard has far fewer
const WINDOW_SECONDS = 300; // of the graph of decisions
const DECISIONS = ["pass", "flag", "unchecked"];
const SVG = "http://www.w3.org/2000/svg";
const SOURCES = { SOURCE_DEFAULT: "default", SOURCE_FILE: "file", SOURCE_ENVIRONMENT: "environment", SOURCE_OPTION: "option" };

const byId = (id) => document.getElementById(id);
const plural = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;

/** An element with properties, text and children. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function drawing(tag, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

function number(value, digits = 3) {
  return typeof value === "number" && isFinite(value) ? Number(value.toPrecision(digits)).toString() : "–";
}

function moment(text) {
  return text ? new Date(text).toLocaleString([], { dateStyle: "short", timeStyle: "medium" }) : "–";
}

function words(constant, prefix) {
  return (constant || "").replace(prefix, "").toLowerCase().replaceAll("_", " ");
}

function total(counts, among = null) {
  return Object.entries(counts || {}).reduce((sum, [key, count]) => sum + (among && !among.includes(key) ? 0 : Number(count)), 0);
}

function added(all, more) {
  for (const [key, count] of Object.entries(more || {})) all[key] = (all[key] || 0) + Number(count);
  return all;
}

const traffics = (sidecar) => sidecar.error === null ? [...sidecar.models.map((model) => model.traffic), sidecar.unknown_models].filter(Boolean) : [];

// ---- state --------------------------------------------------------------------------------------------------------

let overview = { sidecars: [] };

function drawOverview() {
  const sidecars = overview.sidecars;
  byId("sidecars").replaceChildren(...sidecars.map(sidecarCard));
  drawConditions(sidecars);
  byId("models").replaceChildren(...sidecars.flatMap((sidecar, index) =>
    sidecar.error === null ? sidecar.models.map((model) => modelRow(model, sidecar, sidecars.length > 1)) : []));
  drawDecisions(sidecars);
  drawScores(sidecars);
}

function sidecarCard(sidecar) {
  if (sidecar.error !== null) {
    return element("p", {}, element("strong", { class: "bad", textContent: "not reached " }), `${sidecar.address} ${sidecar.error}`);
  }
  const status = sidecar.status;
  const certified = sidecar.models.filter((model) => model.certificate && model.certificate.accepted);
  const first = certified.map((model) => model.certificate.expires_at).filter(Boolean).sort()[0];
  const card = element("div");
  card.append(element("p", {},
    element("strong", status.ready ? { class: "good", textContent: "ready" } : { class: "bad", textContent: "not ready" }),
    status.ready ? "" : ` ${status.reason}`));
  const pairs = [
    ["Certified", sidecar.models.some((model) => model.certificate)
      ? `${certified.length} of ${plural(sidecar.models.length, "model")}${first ? `, until ${moment(first)}` : ""}`
      : "no certificate is asked for"],
    ["Profiles", sidecar.models.some((model) => model.stale) ? "not those on disk" : "those on disk"],
    ["Upstream server", status.upstream || "none; guard serves the models"],
    ["Requests in progress", String(status.active_requests)],
    ["Evidence log", status.evidence_trouble ? `cannot be written: ${status.evidence_trouble}` : "no trouble"],
    ["Running since", moment(status.started_at)],
    ["Version", status.version],
  ];
  if (sidecar.address) pairs.unshift(["Address", sidecar.address]);
  card.append(element("dl", { class: "pairs" }, ...pairs.flatMap(([name, value]) =>
    [element("dt", { textContent: name }), element("dd", { textContent: value })])));
  return card;
}

function drawConditions(sidecars) {
  const found = sidecars.flatMap((sidecar) => (sidecar.conditions || []).map((each) => ({ ...each, address: sidecar.address })));
  for (const sidecar of sidecars) {
    if (sidecar.error !== null) {
      found.push({ severity: "critical", title: `No answer: ${sidecar.error}`, advice: "Look whether the sidecar runs.", model: "", address: sidecar.address });
    }
  }
  found.sort((one, other) => (other.severity === "critical") - (one.severity === "critical"));
  const items = found.map((each) => element("li", { class: each.severity },
    element("strong", { textContent: [each.address, each.model, each.title].filter(Boolean).join(": ") }),
    element("br"), each.advice + " ",
    each.runbook ? element("a", { href: each.runbook, rel: "noreferrer", textContent: "Runbook" }) : null));
  const now = items.map((item) => item.textContent).join("\n");
  const list = byId("conditions");
  if (list.dataset.shown !== now) { // a screen reader reads it again only when it has changed
    list.dataset.shown = now;
    list.replaceChildren(...(items.length ? items : [element("li", { class: "quiet", textContent: "Nothing at present." })]));
  }
}

function modelRow(model, sidecar, several) {
  const certificate = model.certificate;
  const until = !certificate ? "not asked for" : certificate.accepted ? moment(certificate.expires_at) : "not accepted";
  const verdict = words(model.verdict.outcome, "OUTCOME_") + (model.verdict.target_class ? ` → ${model.verdict.target_class}` : "");
  const flagged = Number(model.traffic.images.flag || 0);
  const alarms = model.alarms.map((alarm) => `${words(alarm.kind, "KIND_")}: ${alarm.stream}`);
  const cell = (text, bad = false) => element("td", bad ? { class: "bad", textContent: text } : { textContent: text });
  return element("tr", {},
    element("th", { scope: "row", textContent: several ? `${model.label} (${sidecar.address})` : model.label }),
    cell(`${words(model.mode, "MODE_")}, ${words(model.failure_policy, "FAILURE_POLICY_")}`),
    cell(verdict, model.verdict.outcome === "OUTCOME_BACKDOORED"),
    cell(until, certificate && !certificate.accepted),
    cell(`${model.digest.slice(-12)}, read ${moment(model.loaded_at)}${model.stale ? "; not the one on disk" : "; the one on disk"}`, model.stale),
    cell(number(model.alpha)),
    cell(`${flagged} of ${total(model.traffic.images)}; α explains ${number(model.alpha * total(model.traffic.images, ["pass", "flag"]))}`),
    cell(alarms.join("; ") || "none", alarms.length > 0));
}

// ---- decisions ----------------------------------------------------------------------------------------------------

const history_ = []; // {time, pass, flag, unchecked}: sums over all sidecars

function drawDecisions(sidecars) {
  const requests = {}, unchecked = {};
  for (const sidecar of sidecars) for (const traffic of traffics(sidecar)) {
    added(requests, traffic.requests);
    added(unchecked, traffic.unchecked);
  }
  byId("decisions").replaceChildren(...DECISIONS.flatMap((decision) =>
    [element("dt", { textContent: decision }), element("dd", { textContent: String(requests[decision] || 0) })]));
  const reasons = Object.entries(unchecked).sort((one, other) => other[1] - one[1]);
  byId("unchecked").replaceChildren(...(reasons.length ? reasons : [["none", ""]]).flatMap(([reason, count]) =>
    [element("dt", { textContent: reason.replaceAll("_", " ") }), element("dd", { textContent: String(count) })]));
  history_.push({ time: Date.now() / 1000, ...Object.fromEntries(DECISIONS.map((decision) => [decision, requests[decision] || 0])) });
}

function drawRates() {
  const now = Date.now() / 1000;
  const last = history_[history_.length - 1];
  // Without a new state nothing was decided, so the last one still holds.
  if (last && now - last.time > 2) history_.push({ ...last, time: now });
  while (history_.length > 2 && history_[1].time < now - WINDOW_SECONDS) history_.shift();
  const points = Object.fromEntries(DECISIONS.map((decision) => [decision, []]));
  for (let index = 1; index < history_.length; index++) {
    const [before, after] = [history_[index - 1], history_[index]];
    for (const decision of DECISIONS) {
      // A sidecar that was started again counts from 0.
      const rate = Math.max(0, after[decision] - before[decision]) / Math.max(0.5, after.time - before.time);
      points[decision].push([after.time, rate]);
    }
  }
  const most = Math.max(1e-9, ...DECISIONS.flatMap((decision) => points[decision].map(([, rate]) => rate)));
  const place = ([time, rate]) => `${(600 * (1 - (now - time) / WINDOW_SECONDS)).toFixed(1)},${(100 - 90 * rate / most).toFixed(1)}`;
  const picture = drawing("svg", { viewBox: "0 0 600 116", role: "img", "aria-label": `Requests per second; at most ${number(most)}` });
  for (const decision of DECISIONS) picture.append(drawing("polyline", { class: decision, points: points[decision].map(place).join(" ") }));
  picture.append(drawing("text", { x: 0, y: 10 }, most > 1e-6 ? `${number(most)} per second` : "no requests"), drawing("text", { x: 0, y: 114 }, "five minutes ago"), drawing("text", { x: 600, y: 114, "text-anchor": "end" }, "now"));
  byId("rates").replaceChildren(picture, ...DECISIONS.map((decision) => element("span", { class: `key ${decision}`, textContent: `— ${decision}` })));
}

function drawScores(sidecars) {
  const models = sidecars.flatMap((sidecar) => sidecar.error === null ? sidecar.models : [])
    .filter((model) => model.traffic.scores && model.traffic.scores.counts.length <= MOST_BARS);
  byId("scores").replaceChildren(...models.map((model) => {
    const counts = model.traffic.scores.counts.map(Number);
    const bounds = model.traffic.scores.bounds.map(Number);
    const most = Math.max(1, ...counts);
    const width = 600 / counts.length;
    const picture = drawing("svg", { viewBox: "0 0 600 130", role: "img", "aria-label": `Scores of ${model.label}; threshold ${number(model.threshold)}` });
    counts.forEach((count, index) => {
      // Few flagged images beside many others must be seen, so heights are logarithmic.
      const height = 95 * Math.log1p(count) / Math.log1p(most);
      const kind = bounds[index] > model.threshold ? "flag" : "pass";
      const bar = drawing("rect", { class: kind, x: index * width + 1, y: 105 - height, width: width - 2, height });
      bar.append(drawing("title", {}, `up to ${number(bounds[index])}: ${plural(count, "image")}`));
      picture.append(bar, drawing("text", { x: (index + 1) * width, y: 118, "text-anchor": "end" }, isFinite(bounds[index]) ? String(bounds[index]) : "∞"));
    });
    const at = bounds.findIndex((bound) => bound >= model.threshold);
    const low = at > 0 ? bounds[at - 1] : 0;
    const share = at < 0 || !isFinite(bounds[at]) ? 0.5 : (model.threshold - low) / Math.max(1e-9, bounds[at] - low);
    const x = Math.max(0, (at < 0 ? counts.length - 1 : at) + share) * width;
    picture.append(drawing("line", { x1: x, x2: x, y1: 0, y2: 105, "stroke-dasharray": "4 3", "stroke-width": 2 }));
    return element("figure", {}, picture, element("figcaption", { textContent: `${model.label}: ${plural(total(model.traffic.images, ["pass", "flag"]), "image")} scored, threshold ${number(model.threshold)}` }));
  }));
}

// ---- flagged images -----------------------------------------------------------------------------------------------

function requestText(evidence) {
  return evidence.text ? element("blockquote", { textContent: evidence.text }) : null;
}

function picture(evidence) {
  if (!evidence.thumbnail) return null;
  const kind = evidence.thumbnail.startsWith("iVBOR") ? "png" : "jpeg";
  return element("img", { class: "thumb", alt: "the flagged image, reduced", src: `data:image/${kind};base64,${evidence.thumbnail}` });
}

function triggerPicture(evidence) {
  const models = (overview.sidecars[evidence.sidecar] || {}).models || [];
  const model = models.find((each) => each.label === evidence.model) || { triggers: [] };
  const trigger = model.triggers.find((each) => each.id === evidence.trigger);
  if (!trigger) return null;
  const image = trigger.picture ? element("img", { class: "trigger", src: trigger.picture,
    alt: `the reconstructed trigger ${trigger.id}: a test card, the card with it, and the difference` }) : null;
  return element("figure", {}, image, element("figcaption", { textContent: `trigger ${trigger.id} (${trigger.family}) → ${trigger.target_class}` }));
}

function scoreBar(value, threshold) {
  const bar = element("div", { class: "bar", role: "img", ariaLabel: `score ${number(value)}, threshold ${number(threshold)}` }, element("i"), element("b"));
  const most = Math.max(value, threshold, 1e-9) * 1.1;
  bar.firstChild.style.width = `${Math.max(0, Math.min(100, 100 * value / most))}%`;
  bar.lastChild.style.left = `${Math.max(0, Math.min(100, 100 * threshold / most))}%`;
  return bar;
}

function flaggedItem(id, evidence) {
  const answer = evidence.reference_class && evidence.reference_class !== evidence.predicted_class ? `; the reference model answers ${evidence.reference_class}` : "";
  const threshold = evidence.thresholds.score;
  return element("li", {}, picture(evidence),
    element("div", { class: "text" },
      element("a", { href: `/record/${id}`, textContent: `${evidence.request_id || "request without an id"}, image ${evidence.image}` }),
      element("div", { textContent: `${evidence.model}: ${evidence.predicted_class}${answer}` }),
      element("div", { class: "note", textContent: `${moment(evidence.time)} · decided by ${evidence.decided_by || "–"} · score ${number(evidence.scores.score)} above ${number(threshold)} · p ${number(evidence.p_value)}` }),
      typeof threshold === "number" && typeof evidence.scores.score === "number" ? scoreBar(evidence.scores.score, threshold) : null),
    triggerPicture(evidence));
}

let lost = 0;

function showEvidence(id, evidence) {
  const list = byId("flagged");
  list.prepend(flaggedItem(id, evidence));
  while (list.children.length > MOST_SHOWN) list.lastChild.remove();
  byId("none").hidden = true;
  lost += Number(evidence.lost || 0);
  byId("lost").hidden = lost === 0;
  byId("lost").textContent = `${plural(lost, "more image")} came faster than they could be shown; the evidence log has them.`;
}

async function showRecord(id) {
  const place = byId("record");
  byId("overview").hidden = true;
  place.hidden = false;
  const back = element("p", {}, element("a", { href: "/", textContent: "← all" }));
  const state = await fetch("/api/overview").catch(() => null);
  if (state !== null && state.ok) overview = await state.json();
  const answer = await fetch(`/api/evidence/${id}`).catch(() => null);
  if (answer === null || !answer.ok) {
    place.replaceChildren(back, element("h1", { textContent: "This record is no longer here" }), "The evidence log may still have it: guard log lists it, and guard log --show writes its page.");
    return;
  }
  const evidence = await answer.json();
  document.title = `guard: ${evidence.request_id || id}`;
  const threshold = evidence.thresholds.score;
  const facts = [
    ["Time", moment(evidence.time)], ["Request", evidence.request_id], ["Image", String(evidence.image)], ["Trace", evidence.trace_id],
    ["Model", evidence.model], ["Digest of the model", evidence.model_digest], ["Decision", words(evidence.decision, "DECISION_")],
    ["Mode", words(evidence.mode, "MODE_")], ["Predicted class", evidence.predicted_class], ["Class of the reference model", evidence.reference_class],
    ["p-value", number(evidence.p_value)], ["α", number(evidence.alpha)], ["Decided by", evidence.decided_by], ["Trigger", evidence.trigger],
    ["Leads to", evidence.target_class], ["Second look", evidence.second_look], ["SHA-256 of the input", evidence.input_digest],
    ["In the evidence log", Number(evidence.record) ? `record ${evidence.record}` : ""],
  ].filter(([, value]) => value);
  const scores = Object.entries(evidence.scores).map(([name, value]) =>
    element("tr", {}, element("th", { scope: "row", textContent: name }), element("td", { textContent: number(value) }), element("td", { textContent: number(evidence.thresholds[name]) })));
  place.replaceChildren(back, element("h1", { textContent: `${words(evidence.decision, "DECISION_") === "flag" ? "Flagged" : "Passed"}: ${evidence.request_id || "request without an id"}, image ${evidence.image}` }),
    ...[picture(evidence) || requestText(evidence) || element("p", { class: "note", textContent: "Pictures and texts of requests are not kept; --thumbnails keeps them." }), triggerPicture(evidence)].filter(Boolean),
    ...evidence.explanation_sentences.map((sentence) => element("p", { textContent: sentence })),
    ...(typeof threshold === "number" ? [scoreBar(evidence.scores.score, threshold)] : []),
    element("h2", { textContent: "Scores" }),
    element("table", {}, element("thead", {}, element("tr", {}, ...["Score", "Value", "Threshold"].map((name) => element("th", { scope: "col", textContent: name })))), element("tbody", {}, ...scores)),
    element("h2", { textContent: "Facts" }),
    element("table", {}, element("tbody", {}, ...facts.map(([name, value]) => element("tr", {}, element("th", { scope: "row", textContent: name }), element("td", { class: "value", textContent: value }))))));
}

async function showSettings() {
  const answer = await fetch("/api/configuration").catch(() => null);
  const sidecars = answer !== null && answer.ok ? await answer.json() : [];
  byId("values").replaceChildren(...sidecars.flatMap((sidecar) => sidecar.settings.map((each) => element("tr", {},
    element("th", { scope: "row", textContent: each.name }), element("td", { class: "value", textContent: each.value }),
    element("td", { textContent: SOURCES[each.source] || "–" }),
    element("td", { textContent: [sidecar.address, each.model].filter(Boolean).join(" ") || "the sidecar" })))));
}

// ---- events -------------------------------------------------------------------------------------------------------

function follow() {
  const events = new EventSource("/api/events");
  const say = (text) => { byId("connection").textContent = text; };
  events.addEventListener("open", () => say("live"));
  events.addEventListener("reset", () => { byId("flagged").replaceChildren(); byId("none").hidden = false; lost = 0; });
  events.addEventListener("overview", (event) => { overview = JSON.parse(event.data); drawOverview(); });
  events.addEventListener("evidence", (event) => showEvidence(event.lastEventId, JSON.parse(event.data)));
  events.addEventListener("error", () => {
    say("connection lost; trying again …");
    if (events.readyState === EventSource.CLOSED) { // it was refused, and would not try again by itself
      events.close();
      setTimeout(follow, 5000);
    }
  });
}

if (location.pathname.startsWith("/record/")) {
  byId("connection").textContent = "";
  showRecord(location.pathname.slice("/record/".length)); // an id has no letters that addresses write differently
} else {
  byId("settings").addEventListener("toggle", () => { if (byId("settings").open) showSettings(); });
  follow();
  setInterval(drawRates, 1000);
}
