// Shows the Gaussians of this page, which splats.js draws: no libraries, no network.

const scene = JSON.parse(document.getElementById('scene').textContent);
const canvas = document.getElementById('view');
const say = (text) => { document.getElementById('message').textContent = text; };

// --- The camera --------------------------------------------------------------------------------

const camera = {
  eye: [0, 0, 0], right: [1, 0, 0], forward: [0, 0, -1], pivot: scene.focus, stop: scene.stops[0],
  axes() { return { right: this.right, forward: this.forward, down: cross(this.forward, this.right) }; },
  lens() {  // The whole picture of the last stop fits into the window.
    const { focal, centre, size } = this.stop, s = Math.min(canvas.width / size[0], canvas.height / size[1]);
    const at = (k, side) => side / 2 + s * (centre[k] - size[k] / 2);
    return { focal: focal.map((f) => f * s), centre: [at(0, canvas.width), at(1, canvas.height)] };
  },
  place(eye, right, forward) {
    this.eye = eye; this.forward = unit(forward);
    this.right = unit(add(right, this.forward, -dot(right, this.forward)));
  },
  turn(axis, angle, about) {
    if (about) this.eye = add(about, turned(add(this.eye, about, -1), axis, angle));
    this.place(this.eye, turned(this.right, axis, angle), turned(this.forward, axis, angle));
  },
  orbit(dx, dy) { this.turn(scene.up, -dx, this.pivot); this.turn(this.right, -dy, this.pivot); },
  move(v) { this.eye = add(this.eye, v); this.pivot = add(this.pivot, v); },
  reach() { return Math.hypot(...add(this.pivot, this.eye, -1)); },
  pan(dx, dy) {
    const s = this.reach() / this.lens().focal[0], { right, down } = this.axes();
    this.move(add(right.map((x) => -x * dx * s), down, -dy * s));
  },
  zoom(factor) { this.eye = add(this.pivot, add(this.eye, this.pivot, -1), factor); },
};

function main(splats) {
  const view = makeView(canvas, splats, scene, () => {}, (e) => say(`The sorting of Gaussians failed: ${e.message}`));
  let flight = null, last = performance.now();
  const held = new Set();

  function tick(now) {
    const seconds = Math.min((now - last) / 1000, 0.1); last = now;
    view.fit();
    if (held.size) fly(seconds);
    if (flight) flight(now);
    if (view.draw({ eye: camera.eye, ...camera.axes(), ...camera.lens() })) {
      document.getElementById('message').hidden = true;
      document.body.dataset.shown = view.order();  // What tests wait for.
    }
    requestAnimationFrame(tick);
  }
  function fly(seconds) {
    const { right, down, forward } = camera.axes(), speed = seconds;  // As the cameras are within 1 of the origin.
    const ways = { w: [forward, 1], s: [forward, -1], d: [right, 1], a: [right, -1], e: [down, -1], q: [down, 1] };
    for (const key of held) { const [way, sign] = ways[key]; camera.move(way.map((x) => x * sign * speed)); }
    view.change();
  }

  // Stops: the capture's cameras.
  const list = document.getElementById('stop');
  scene.stops.forEach((stop, k) => list.add(new Option(stop.name, k)));
  function go(k, slowly = true) {
    k = (k + scene.stops.length) % scene.stops.length;
    list.value = k;
    const stop = scene.stops[k], began = performance.now();
    const from = { eye: camera.eye, right: camera.right, forward: camera.forward };
    flight = (now) => {
      const t = slowly ? Math.min((now - began) / 700, 1) : 1, s = t * t * (3 - 2 * t);
      const between = (a, b) => a.map((x, i) => x + s * (b[i] - x));
      camera.place(between(from.eye, stop.eye), between(from.right, stop.right), between(from.forward, stop.forward));
      if (t >= 0.5) camera.stop = stop;
      if (t === 1) { flight = null; camera.pivot = add(camera.eye, camera.forward, Math.max(dot(add(scene.focus, camera.eye, -1), camera.forward), 0.1)); }
      view.change();
    };
  }
  list.onchange = () => go(+list.value);
  document.getElementById('previous').onclick = () => go(+list.value - 1);
  document.getElementById('next').onclick = () => go(+list.value + 1);
  document.getElementById('help').onclick = (e) => {
    const keys = document.getElementById('keys'); keys.hidden = !keys.hidden; e.target.setAttribute('aria-expanded', !keys.hidden);
  };

  // Mouse, fingers and keys.
  const fingers = new Map();
  const pixels = () => canvas.width / canvas.clientWidth;  // Canvas pixels for one pixel of the page.
  canvas.onpointerdown = (e) => { canvas.setPointerCapture(e.pointerId); fingers.set(e.pointerId, e); flight = null; };
  canvas.onpointerup = canvas.onpointercancel = (e) => fingers.delete(e.pointerId);
  canvas.oncontextmenu = (e) => e.preventDefault();
  canvas.onpointermove = (e) => {
    const before = fingers.get(e.pointerId);
    if (!before) return;
    const dx = e.clientX - before.clientX, dy = e.clientY - before.clientY, scale = pixels();
    if (fingers.size === 1) {
      if (e.buttons & 6 || e.shiftKey) camera.pan(dx * scale, dy * scale);
      else camera.orbit(Math.PI * dx / canvas.clientHeight, Math.PI * dy / canvas.clientHeight);
    } else if (fingers.size === 2) {
      const other = [...fingers.values()].find((f) => f.pointerId !== e.pointerId);
      const apart = (f) => Math.hypot(f.clientX - other.clientX, f.clientY - other.clientY) || 1;
      camera.zoom(apart(before) / apart(e)); camera.pan(dx * scale / 2, dy * scale / 2);
    }
    fingers.set(e.pointerId, e); view.change();
  };
  canvas.addEventListener('wheel', (e) => {
    e.preventDefault(); camera.zoom(Math.exp(0.001 * e.deltaY * (e.deltaMode ? 30 : 1))); view.change();
  }, { passive: false });
  canvas.ondblclick = (e) => { pick(e.clientX * pixels(), e.clientY * pixels()); };
  // Turns about the nearest Gaussian under the pointer.
  function pick(px, py) {
    const { right, down, forward } = camera.axes(), { focal, centre } = camera.lens(), floats = new Float32Array(splats.words.buffer);
    let best = Infinity;
    for (let i = 0; i < splats.n; i++) {
      const v = add([...floats.subarray(i * TEXELS * 4, i * TEXELS * 4 + 3)], camera.eye, -1), z = dot(v, forward);
      if (z < scene.near || z > best || splats.words[i * TEXELS * 4 + 4] >>> 24 < 100) continue;
      const x = focal[0] * dot(v, right) / z + centre[0] - px, y = focal[1] * dot(v, down) / z + centre[1] - py;
      if (x * x + y * y < 64) { best = z; camera.pivot = add(camera.eye, v); }
    }
  }
  addEventListener('keydown', (e) => {
    if (e.target === list || e.ctrlKey || e.metaKey || e.altKey) return;
    const key = e.key.toLowerCase();
    if ('wasdqe'.includes(key) && key.length === 1) { held.add(key); flight = null; }
    if (e.key === 'ArrowRight') go(+list.value + 1);
    if (e.key === 'ArrowLeft') go(+list.value - 1);
  });
  addEventListener('keyup', (e) => held.delete(e.key.toLowerCase()));
  addEventListener('blur', () => held.clear());

  // page.html#camera=NAME or a number opens at that camera; #bare hides the bar.
  function readHash(slowly) {
    const options = new URLSearchParams(location.hash.slice(1)), wanted = options.get('camera');
    document.body.classList.toggle('bare', options.has('bare'));
    const named = scene.stops.findIndex((stop) => stop.name === wanted);
    go(named >= 0 ? named : Number(wanted) || 0, slowly);
  }
  addEventListener('hashchange', () => readHash(true));
  readHash(false);
  requestAnimationFrame(tick);
}

const packed = Uint8Array.from(atob(document.getElementById('splats').textContent), (c) => c.charCodeAt(0));
unzip(packed).then((data) => main(unpack(data))).catch((e) => {
  say(`The scene cannot be shown: ${e.message}`);
});
