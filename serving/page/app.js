// The page of the service. It talks to its own origin only, keeps everything in this tab's memory, and lets go of what
// it no longer shows.

const NAMES = {
  original: "Original",
  anonymized: "Anonymized",
  recovered: "Recovered",
  wrong: "Wrong password",
};
const HINTS = {
  anonymized:
    "The file itself says where the faces are. Keep it as it is: a screenshot or a smaller copy recovers less well.",
  recovered: "A wrong password gives a face too. Nothing here knows which one was right.",
  wrong: "This is what somebody gets who guesses.",
};
const KINDS = Object.keys(NAMES);
const EXTENSIONS = { "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp" };

const $ = (id) => document.getElementById(id);

const state = {
  mode: "anonymize",
  /** kind -> { blob, url, name, width, height, seen: whether this browser can show it } */
  pictures: new Map(),
  /** faces of the picture that was given: [{ box: [x0, y0, x1, y1], changed: boolean }] */
  faces: [],
  /** which face the pointer or the keyboard is at in the list, or null */
  pointed: null,
  left: null,
  right: null,
  zoom: -1,
  busy: null,
  limits: null,
  /** API key, where the service asks for one */
  key: "",
  /** Counts up with every picture that is chosen, so that an answer about an older one is dropped. */
  generation: 0,
};

// -- talking to the service ---------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(title, detail, status = 0) {
    super(detail);
    this.title = title;
    this.status = status;
  }
}

// Waiting longer than this is the visitor's decision. (A rate limit may ask for minutes.)
const PATIENCE = 8;

/** POST a form; answers the Response, or throws Refused with something a person can read. */
async function post(path, form, signal, onWait) {
  for (let attempt = 1; ; attempt++) {
    let response;
    try {
      const headers = state.key ? { Authorization: `Bearer ${state.key}` } : {};
      response = await fetch(path, { method: "POST", body: form, headers, signal, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The service cannot be reached", "Check the connection and try again.");
    }
    if (response.ok) return response;
    const wait = Number(response.headers.get("Retry-After"));
    const later = response.status === 429 || response.status === 503;
    if (later && wait && wait <= PATIENCE && attempt < 4) {
      onWait?.();
      await pause(wait * 1000, signal);
      continue;
    }
    const problem = await response.json().catch(() => ({}));
    if (response.status === 401) askForKey();
    const detail = problem.detail ?? `The service answered with status ${response.status}.`;
    throw new Refused(
      problem.title ?? "That did not work",
      later && wait > PATIENCE ? `${detail} Try again in ${wait} seconds.` : detail,
      response.status,
    );
  }
}

function askForKey() {
  $("card-key").hidden = false;
  $("key").focus();
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("aborted", "AbortError"));
    });
  });
}

async function describeService() {
  try {
    const response = await fetch("v1/model", { cache: "no-store" });
    if (response.ok) {
      const model = await response.json();
      state.limits = model.limits;
      $("service").dataset.state = "ready";
      $("service-text").textContent = "Ready";
      $("model").textContent = ` · model ${model.digest.slice(0, 12)} · version ${model.version}`;
      return;
    }
    const failed = (await fetch("healthz", { cache: "no-store" })).status === 503;
    $("service").dataset.state = failed ? "down" : "";
    $("service-text").textContent = failed ? "No model could be loaded" : "Starting…";
  } catch {
    $("service").dataset.state = "down";
    $("service-text").textContent = "Not reachable";
  }
  setTimeout(describeService, 2000);
}

// -- pictures -----------------------------------------------------------------------------------------------------

async function keep(kind, blob, name) {
  forget(kind);
  const url = URL.createObjectURL(blob);
  const picture = { blob, url, name, width: 0, height: 0, seen: false };
  state.pictures.set(kind, picture);
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
    picture.width = image.naturalWidth;
    picture.height = image.naturalHeight;
    picture.seen = true;
  } catch {
    // The browser cannot show it; the service may still read it, or says why not.
  }
  return picture;
}

function forget(kind) {
  const picture = state.pictures.get(kind);
  if (picture) URL.revokeObjectURL(picture.url);
  state.pictures.delete(kind);
}

function forgetAll() {
  KINDS.forEach(forget);
  state.faces = [];
  state.pointed = null;
  state.left = state.right = null;
  state.zoom = -1;
}

const given = () => (state.mode === "anonymize" ? "original" : "anonymized");

async function choose(file) {
  const generation = ++state.generation;
  state.busy?.abort();
  clearAlert();
  if (state.limits && file.size > state.limits.body_bytes - 16384) {
    const megabytes = Math.floor(state.limits.body_bytes / 1e6);
    return showAlert(new Refused("The file is too large", `It may have at most ${megabytes} MB.`));
  }
  forgetAll();
  $("outcome").textContent = "";
  const stem = file.name.replace(/(\.(anonymized|recovered))?\.[^.]*$/, "") || "picture";
  const picture = await keep(given(), file, stem);
  if (generation !== state.generation) return;
  state.left = given();
  describeFile(file.name, picture);
  // A file that the browser cannot show (HEIF from a phone, or no picture at all): the service has the last word.
  if (picture.width) render();
  await findFaces(generation);
}

function describeFile(name, picture) {
  const pixels = picture.width ? `${picture.width} × ${picture.height}, ` : "";
  $("file-fact").textContent = `${name} – ${pixels}${size(picture.blob.size)}`;
}

async function findFaces(generation) {
  const picture = state.pictures.get(given());
  const form = new FormData();
  form.append("image", picture.blob, "picture");
  $("faces-fact").hidden = false;
  $("faces-fact").textContent = "Looking for faces…";
  try {
    const response = await post("v1/detect", form);
    const found = await response.json();
    if (generation !== state.generation) return;
    [picture.width, picture.height] = found.size;
    state.faces = found.faces.map((face) => ({ box: face.box, changed: true }));
    describeChoice();
  } catch (error) {
    if (generation !== state.generation) return;
    $("faces-fact").hidden = true;
    if (!picture.width && error.status !== 401) {
      forgetAll();
      $("file").value = "";
    }
    showAlert(error);
  }
  render();
}

function describeChoice() {
  const total = state.faces.length;
  const changed = state.faces.filter((face) => face.changed).length;
  const found = total === 1 ? "1 face found" : `${total} faces found`;
  // An anonymized picture carries where its faces are, so that it can be recovered even where none is found.
  $("faces-fact").hidden = !total && state.mode === "recover";
  if (!total) $("faces-fact").textContent = "No face was found in this picture.";
  else if (state.mode === "recover" || changed === total) $("faces-fact").textContent = `${found}.`;
  else if (!changed) $("faces-fact").textContent = `${found}, none will be changed.`;
  else $("faces-fact").textContent = `${found}, ${changed} will be changed.`;
}

function size(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

// -- the three verbs ----------------------------------------------------------------------------------------------

async function edit(path, kind, source, password, button, message) {
  if (state.busy) return;
  clearAlert();
  const generation = state.generation;
  const control = new AbortController();
  state.busy = control;
  busy(button, message);
  const began = performance.now();
  try {
    const form = new FormData();
    form.append("image", source.blob, "picture");
    form.append("password", password);
    if (kind === "anonymized") {
      form.append("format", $("format").value);
      form.append("keep_metadata", $("keep-metadata").checked ? "true" : "false");
      const chosen = state.faces.flatMap((face, index) => (face.changed ? [index] : []));
      if (chosen.length && chosen.length < state.faces.length) form.append("faces", chosen.join(","));
    }
    const response = await post(path, form, control.signal, () => {
      $("veil-text").textContent = "The service is busy, trying again…";
    });
    const blob = await response.blob();
    if (generation !== state.generation) return;
    await keep(kind, blob, source.name);
    const faces = Number(response.headers.get("X-Mien-Faces"));
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    const many = faces === 1 ? "1 face" : `${faces} faces`;
    const done = { anonymized: "changed", recovered: "given back with this password", wrong: "changed by another password" };
    $("outcome").textContent = `${many} ${done[kind]} in ${seconds} s.`;
    $("outcome-hint").textContent = HINTS[kind];
    if (kind === "anonymized") {
      forget("recovered");
      forget("wrong");
      state.left = "original";
    } else {
      state.left = state.pictures.has("original") ? "original" : "anonymized";
    }
    state.right = kind;
    if (kind === "anonymized" || state.pictures.size === 2) lookAtTheFace();
  } catch (error) {
    if (error.name !== "AbortError") showAlert(error);
  } finally {
    state.busy = null;
    busy(button, null);
    render();
    if (generation === state.generation && state.right === kind && matchMedia("(max-width: 820px)").matches) {
      const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
      $("view").scrollIntoView({ block: "start", behavior: still ? "auto" : "smooth" });
    }
  }
}

/** Begin with the split through the first face, and close to it where it is alone and small. */
function lookAtTheFace() {
  const [face] = state.faces;
  const picture = state.pictures.get(given());
  if (!face) return;
  const [x0, y0, x1, y1] = face.box;
  const small = Math.max(x1 - x0, y1 - y0) < Math.min(picture.width, picture.height) / 3;
  state.zoom = state.faces.length === 1 && small ? 0 : -1;
  const part = region(picture);
  $("split").value = Math.round((((x0 + x1) / 2 - part.x) / part.width) * 100);
}

function busy(button, message) {
  $("veil").hidden = !message;
  $("veil-text").textContent = message ?? "";
  $("compare").setAttribute("aria-busy", String(Boolean(message)));
  for (const id of ["anonymize", "recover", "wrong"]) $(id).disabled = Boolean(message);
  button.querySelector(".label").dataset.idle ??= button.querySelector(".label").textContent;
  button.querySelector(".label").textContent = message ?? button.querySelector(".label").dataset.idle;
}

function needPassword(input) {
  if (input.value) return input.value;
  showAlert(new Refused("The password is empty", "Type at least one character."));
  input.focus();
  return null;
}

// -- showing ------------------------------------------------------------------------------------------------------

function showAlert(error) {
  const title = document.createElement("strong");
  title.textContent = error.title ?? "That did not work";
  const text = document.createElement("div");
  text.append(title, error.title ? error.message : "");
  const close = document.createElement("button");
  close.type = "button";
  close.textContent = "Close";
  close.setAttribute("aria-label", "Close this message");
  close.addEventListener("click", clearAlert);
  $("alert").replaceChildren(text, close);
  $("alert").hidden = false;
  $("alert").scrollIntoView({ block: "nearest" });
  if (!(error instanceof Refused)) throw error;
}

function clearAlert() {
  $("alert").hidden = true;
  $("alert").replaceChildren();
}

function render() {
  const anonymizing = state.mode === "anonymize";
  const source = state.pictures.get(given());
  $("title-photo-text").textContent = anonymizing ? "Photo" : "Anonymized picture";
  $("drop").classList.toggle("filled", Boolean(source));
  $("drop-title").textContent = source ? "Choose another" : anonymizing ? "Choose a photo" : "Choose an anonymized picture";
  $("empty-text").textContent = anonymizing
    ? "Your photo will appear here, beside its anonymized twin."
    : "A picture that Mien anonymized will appear here, beside what the password makes of it.";
  $("file-fact").hidden = !source;
  if (!source) $("faces-fact").hidden = true;
  $("card-anonymize").hidden = !anonymizing;
  $("card-recover").hidden = !state.pictures.has("anonymized");
  $("number-recover").textContent = anonymizing ? "3" : "2";
  $("password").disabled = !source;
  const someone = state.faces.some((face) => face.changed);
  $("anonymize").disabled = Boolean(state.busy) || !source || (state.faces.length > 0 && !someone);
  $("anonymize").querySelector(".label").textContent = state.busy
    ? $("anonymize").querySelector(".label").textContent
    : state.pictures.has("anonymized") && anonymizing ? "Anonymize again" : "Anonymize";
  $("empty").hidden = Boolean(source);
  $("view").hidden = !source;
  renderFaces(source);
  if (!source) return;
  renderChoices();
  renderCompare();
  renderBoxes();
  renderTiles();
  renderSave();
}

function renderSave() {
  const saveable = state.right && state.right !== given();
  $("result").hidden = !state.right;
  $("save").hidden = !saveable;
  if (!saveable) return $("save").removeAttribute("href");
  offer($("save"), state.right);
  $("save-text").textContent = state.right === "wrong" ? "Save this picture" : `Save ${NAMES[state.right].toLowerCase()} picture`;
}

function offer(link, kind) {
  const picture = state.pictures.get(kind);
  link.href = picture.url;
  link.download = `${picture.name}.${kind === "wrong" ? "wrong-password" : kind}.${EXTENSIONS[picture.blob.type] ?? "png"}`;
}

function renderChoices() {
  const others = KINDS.filter((kind) => state.pictures.has(kind) && kind !== state.right);
  $("left").replaceChildren(...others.map((kind) => new Option(NAMES[kind], kind, false, state.left === kind)));
  const zooms = [new Option("Whole picture", -1, false, state.zoom === -1)];
  state.faces.forEach((_, index) => zooms.push(new Option(`Face ${index + 1}`, index, false, state.zoom === index)));
  $("zoom").replaceChildren(...zooms);
  $("choice-left").hidden = !state.right || others.length < 2;
  $("choice-zoom").hidden = !state.right || !state.faces.length;
  $("toolbar").hidden = $("choice-left").hidden && $("choice-zoom").hidden;
}

/** The part of a picture that is looked at, in pixels: everything, or a square around a face. */
function region(picture) {
  const face = state.faces[state.zoom];
  if (!face) return { x: 0, y: 0, width: picture.width, height: picture.height };
  return around(face.box, picture, 2);
}

function around([x0, y0, x1, y1], picture, factor) {
  const side = Math.min(Math.max(x1 - x0, y1 - y0) * factor, picture.width, picture.height);
  const clamp = (value, high) => Math.min(Math.max(value, 0), high);
  return {
    x: clamp((x0 + x1 - side) / 2, picture.width - side),
    y: clamp((y0 + y1 - side) / 2, picture.height - side),
    width: side,
    height: side,
  };
}

function place(image, picture, part) {
  image.style.left = `${(-part.x / part.width) * 100}%`;
  image.style.top = `${(-part.y / part.height) * 100}%`;
  image.style.width = `${(picture.width / part.width) * 100}%`;
  image.style.height = `${(picture.height / part.height) * 100}%`;
}

function renderCompare() {
  const left = state.pictures.get(state.left);
  const right = state.pictures.get(state.right);
  const part = region(left);
  $("compare").style.setProperty("--ratio", String(part.width / part.height));
  $("compare").classList.toggle("single", !right);
  $("unseen").hidden = left.seen;
  show($("image-left"), left, part, NAMES[state.left]);
  $("tag-left").textContent = NAMES[state.left];
  if (right) {
    show($("image-right"), right, part, NAMES[state.right]);
    $("tag-right").textContent = NAMES[state.right];
  } else {
    $("image-right").removeAttribute("src");
  }
  slide();
}

function show(image, picture, part, name) {
  if (!picture.seen) {
    image.removeAttribute("src");
    image.alt = "";
    return;
  }
  if (image.src !== picture.url) image.src = picture.url;
  image.alt = `${name} picture`;
  place(image, picture, part);
}

function slide() {
  const value = Number($("split").value);
  $("compare").style.setProperty("--split", `${value}%`);
  $("split").setAttribute(
    "aria-valuetext",
    `${value} % ${NAMES[state.left] ?? ""}, ${100 - value} % ${NAMES[state.right] ?? ""}`,
  );
}

const choosing = () => state.mode === "anonymize" && state.faces.length > 0;

function toggle(face) {
  face.changed = !face.changed;
  describeChoice();
  render();
}

/** One switch a face, with its likeness: the choice for keyboard, screen reader and small faces. */
function renderFaces(source) {
  $("faces").hidden = !source || !choosing();
  if ($("faces").hidden) return $("face-list").replaceChildren();
  const someone = state.faces.some((face) => face.changed);
  $("toggle-all").hidden = state.faces.length < 2;
  $("toggle-all").textContent = someone ? "Keep all" : "Change all";
  const focused = document.activeElement?.closest?.("#face-list button")?.dataset.index;
  const items = state.faces.map((face, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.index = index;
    button.setAttribute("role", "switch");
    button.setAttribute("aria-checked", String(face.changed));
    button.setAttribute("aria-label", `Change face ${index + 1}`);
    const thumb = document.createElement("span");
    thumb.className = "thumb";
    if (source.seen) {
      const image = document.createElement("img");
      image.src = source.url;
      image.alt = "";
      place(image, source, around(face.box, source, 1.5));
      thumb.append(image);
    }
    const text = document.createElement("span");
    text.className = "state";
    text.textContent = face.changed ? "Change" : "Keep";
    const number = document.createElement("span");
    number.className = "number-of";
    number.textContent = `${index + 1}`;
    button.append(thumb, text, number);
    button.addEventListener("click", () => toggle(face));
    for (const [type, at] of [["pointerenter", index], ["pointerleave", null], ["focus", index], ["blur", null]]) {
      button.addEventListener(type, () => point(at));
    }
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  $("face-list").replaceChildren(...items);
  if (focused !== undefined) items[focused]?.firstChild.focus();
}

/** Shows in the picture which face of the list is meant. */
function point(index) {
  state.pointed = index;
  [...$("boxes").children].forEach((box, at) => box.classList.toggle("pointed", at === index));
}

/** The same switches as frames around the faces of the photo, before anything was changed. */
function renderBoxes() {
  $("boxes").hidden = !choosing() || Boolean(state.right);
  if ($("boxes").hidden) return $("boxes").replaceChildren();
  const picture = state.pictures.get("original");
  const buttons = state.faces.map((face, index) => {
    const [x0, y0, x1, y1] = face.box;
    const button = document.createElement("button");
    button.type = "button";
    button.tabIndex = -1;
    button.classList.toggle("kept", !face.changed);
    button.classList.toggle("pointed", state.pointed === index);
    button.title = face.changed ? "Will be changed; press to keep it" : "Will be kept; press to change it";
    button.dataset.label = face.changed ? `${index + 1}` : `${index + 1} kept`;
    button.style.left = `${(x0 / picture.width) * 100}%`;
    button.style.top = `${(y0 / picture.height) * 100}%`;
    button.style.width = `${((x1 - x0) / picture.width) * 100}%`;
    button.style.height = `${((y1 - y0) / picture.height) * 100}%`;
    button.addEventListener("click", () => toggle(face));
    return button;
  });
  $("boxes").replaceChildren(...buttons);
}

function renderTiles() {
  const kinds = KINDS.filter((kind) => state.pictures.has(kind));
  if (kinds.length < 2) return $("tiles").replaceChildren();
  const focused = document.activeElement?.closest?.("#tiles button")?.dataset.kind;
  $("tiles").replaceChildren(...kinds.map(tile));
  if (focused) $("tiles").querySelector(`button[data-kind="${focused}"]`)?.focus();
}

function tile(kind) {
  const picture = state.pictures.get(kind);
  const item = document.createElement("li");
  item.className = "tile";
  item.classList.toggle("shown", kind === state.right);

  const button = document.createElement("button");
  button.type = "button";
  button.dataset.kind = kind;
  button.setAttribute("aria-label", `Show ${NAMES[kind].toLowerCase()} on the right`);
  const thumb = document.createElement("span");
  thumb.className = "thumb";
  const image = document.createElement("img");
  if (picture.seen) image.src = picture.url;
  image.alt = "";
  const face = state.faces[Math.max(0, state.zoom)];
  const whole = { box: [0, 0, picture.width, picture.height] };
  place(image, picture, around((face ?? whole).box, picture, face ? 1.9 : 1));
  thumb.append(image);
  const name = document.createElement("span");
  name.className = "name";
  name.textContent = NAMES[kind];
  button.append(thumb, name);
  button.addEventListener("click", () => {
    state.right = kind;
    if (state.left === kind) state.left = KINDS.find((other) => other !== kind && state.pictures.has(other));
    render();
  });
  item.append(button);

  if (kind === given()) {
    const note = document.createElement("span");
    note.className = "no-save";
    note.textContent = "your file";
    item.append(note);
  } else {
    const save = document.createElement("a");
    save.className = "save";
    offer(save, kind);
    save.textContent = "Save";
    save.setAttribute("aria-label", `Save the ${NAMES[kind].toLowerCase()} picture`);
    item.append(save);
  }
  return item;
}

// -- wiring -------------------------------------------------------------------------------------------------------

function setMode(mode) {
  if (mode === state.mode) return;
  state.generation++;
  state.busy?.abort();
  state.mode = mode;
  for (const other of ["anonymize", "recover"]) {
    const tab = $(`mode-${other}`);
    tab.setAttribute("aria-selected", String(other === mode));
    tab.tabIndex = other === mode ? 0 : -1;
  }
  $("panel").setAttribute("aria-labelledby", `mode-${mode}`);
  forgetAll();
  clearAlert();
  $("file").value = "";
  for (const id of ["password", "password-recover"]) $(id).value = "";
  render();
}

for (const mode of ["anonymize", "recover"]) {
  $(`mode-${mode}`).addEventListener("click", () => setMode(mode));
  $(`mode-${mode}`).addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    const next = mode === "anonymize" ? "recover" : "anonymize";
    setMode(next);
    $(`mode-${next}`).focus();
  });
}

$("file").addEventListener("change", () => {
  if ($("file").files.length) choose($("file").files[0]);
});

// A file may be dropped anywhere: next to the zone, the browser would leave the page to show it.
for (const type of ["dragover", "dragenter"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  if (event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((item) => item.type.startsWith("image/"));
  if (file) choose(file);
});

$("form-anonymize").addEventListener("submit", (event) => {
  event.preventDefault();
  const source = state.pictures.get("original");
  const password = source && needPassword($("password"));
  if (password) edit("v1/anonymize", "anonymized", source, password, $("anonymize"), "Changing faces…");
});

$("form-recover").addEventListener("submit", (event) => {
  event.preventDefault();
  const password = needPassword($("password-recover"));
  const source = state.pictures.get("anonymized");
  if (password) edit("v1/recover", "recovered", source, password, $("recover"), "Giving back…");
});

$("form-wrong").addEventListener("submit", (event) => {
  event.preventDefault();
  const password = needPassword($("password-wrong"));
  const source = state.pictures.get("anonymized");
  if (password) edit("v1/recover", "wrong", source, password, $("wrong"), "Trying…");
});

for (const button of document.querySelectorAll("[data-peek]")) {
  button.addEventListener("click", () => {
    const input = $(button.dataset.peek);
    const visible = input.type === "text";
    input.type = visible ? "password" : "text";
    button.textContent = visible ? "Show" : "Hide";
    button.setAttribute("aria-label", `${visible ? "Show" : "Hide"} the ${button.dataset.what}`);
  });
}

$("split").addEventListener("input", slide);
$("left").addEventListener("change", () => {
  state.left = $("left").value;
  render();
});
$("toggle-all").addEventListener("click", () => {
  const changed = !state.faces.some((face) => face.changed);
  for (const face of state.faces) face.changed = changed;
  describeChoice();
  render();
});
$("form-key").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = $("key").value.trim();
  if (!state.key) return $("key").focus();
  clearAlert();
  $("key").value = "";
  $("card-key").hidden = true;
  // What was refused for want of the key: the search for faces always comes first.
  const source = state.pictures.get(given());
  if (source && !state.faces.length) findFaces(state.generation);
});
$("zoom").addEventListener("change", () => {
  state.zoom = Number($("zoom").value);
  render();
});

addEventListener("pagehide", (event) => {
  if (!event.persisted) forgetAll();
});

render();
describeService();
