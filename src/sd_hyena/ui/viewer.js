// The two pictures on one canvas: divided, side by side, their difference, or one after the other.
const find = (selector) => element.querySelector(selector);
const canvas = find("canvas"), pen = canvas.getContext("2d", { willReadFrequently: true });
const dial = find("input"), shown = find("output"), stage = find(".stage");
const dials = { slider: { name: "divider", min: 0, max: 100, value: 50, text: (v) => `${v} %` },
                difference: { name: "gain", min: 1, max: 16, value: 4, text: (v) => `x${v}` } };
let mode = "slider", second = false, asked = 0, pair = { teacher: null, student: null };

function tags(first, second = "", where = 100) {
  find(".first").textContent = first;
  find(".second").textContent = second;
  find(".second").style.left = mode === "side" ? `${where}%` : "auto";
}

function difference(width, height, gain) {
  pen.drawImage(pair.teacher, 0, 0);
  const a = pen.getImageData(0, 0, width, height);
  pen.drawImage(pair.student, 0, 0);
  const b = pen.getImageData(0, 0, width, height);
  for (let i = 0; i < a.data.length; i++) {
    a.data[i] = i % 4 === 3 ? 255 : Math.min(255, gain * Math.abs(a.data[i] - b.data[i]));
  }
  pen.putImageData(a, 0, 0);
}

function paint() {
  const { teacher, student } = pair;
  stage.hidden = !teacher;
  find(".empty").hidden = Boolean(teacher);
  if (!teacher) return;
  const width = teacher.naturalWidth, height = teacher.naturalHeight;
  const gap = mode === "side" && student ? Math.ceil(width / 64) : 0;
  canvas.width = gap ? 2 * width + gap : width;
  canvas.height = height;
  stage.style.maxWidth = `${Math.max(gap ? 1024 : 512, canvas.width)}px`;
  const divided = mode === "slider" && Boolean(student), x = Math.round(width * dial.value / 100);
  stage.classList.toggle("divided", divided);
  find(".rule").style.left = `${dial.value}%`;
  pen.drawImage(mode === "blink" && second && student ? student : teacher, 0, 0);
  if (!student) {
    tags("attention");
  } else if (divided) {
    if (x < width) pen.drawImage(student, x, 0, width - x, height, x, 0, width - x, height);
    tags("attention", "Hyena");
  } else if (gap) {
    pen.drawImage(student, width + gap, 0);
    tags("attention", "Hyena", 100 * (width + gap) / canvas.width);
  } else if (mode === "difference") {
    difference(width, height, Number(dial.value));
    tags("difference");
  } else {
    tags(second ? "Hyena" : "attention");
  }
}

function turn() {
  const now = dials[mode];
  if (now) {
    now.value = Number(dial.value);
    shown.textContent = now.text(dial.value);
  }
  paint();
}

function choose(next) {
  second = next === "blink" && mode === "blink" ? !second : next === "blink";
  mode = next;
  for (const button of element.querySelectorAll("[data-mode]")) {
    button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  }
  const now = dials[mode];
  find(".dial").style.visibility = now ? "visible" : "hidden";
  if (now) {
    find(".dial span").textContent = now.name;
    [dial.min, dial.max] = [now.min, now.max];
    dial.value = now.value;
  }
  turn();
}

async function load(url) {
  if (!url) return null;
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

async function update() {
  const number = ++asked, wanted = props.value || {};
  const [teacher, student] = await Promise.all([load(wanted.teacher), load(wanted.student)]);
  if (number !== asked) return; // a newer pair is on its way
  pair = { teacher, student };
  paint();
}

element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-mode]");
  if (button) choose(button.dataset.mode);
});
dial.addEventListener("input", turn);
for (const kind of ["pointerdown", "pointermove"]) {
  canvas.addEventListener(kind, (event) => {
    if (mode !== "slider" || !event.buttons) return;
    const box = canvas.getBoundingClientRect();
    dial.value = Math.round(100 * (event.clientX - box.left) / box.width);
    turn();
  });
}
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, button, a, [contenteditable], [role=listbox]");
  if (event.key !== " " || typing || !pair.student) return;
  event.preventDefault();
  choose("blink");
});
watch("value", update);
choose("slider");
update();
