// Draws the run's Gaussians under the canvas of viser's page, from its camera. They are seen where
// viser shows no picture. viser's client hands each new camera to a worker, which sends it to the
// server; this script, which runs before the client, reads these messages.

const canvas = document.createElement('canvas');
canvas.style.cssText = 'position: absolute; inset: 0; z-index: -1; width: 100%; height: 100%';
let camera = null, view = null, waiting = false;

const post = Worker.prototype.postMessage;
Worker.prototype.postMessage = function (data, ...more) {
  if (data && data.message && data.message.type === 'ViewerCameraMessage') {
    camera = data.message;
    if (view) view.change();
    wake();
  }
  return post.call(this, data, ...more);
};

function wake() {
  if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); }
}

function draw() {
  const above = document.querySelector('canvas[data-engine]');  // three.js names itself there.
  if (!above || !camera || !view) return;
  if (canvas.parentElement !== above.parentElement) above.before(canvas);
  view.fit();
  const [w, x, y, z] = camera.wxyz, flip = ([a, b, c]) => [a, -b, -c];  // To the axes of the .spz.
  const focal = canvas.height / 2 / Math.tan(camera.fov / 2);
  const drawn = view.draw({
    eye: flip(camera.position),
    right: flip([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)]),
    down: flip([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)]),
    forward: flip([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)]),
    focal: [focal, focal], centre: [canvas.width / 2, canvas.height / 2],
  });
  if (drawn) canvas.dataset.pictures = 1 + (+canvas.dataset.pictures || 0);  // What tests count.
}

const failed = (e) => console.error(`The Gaussians cannot be shown: ${e.message}`);
const folder = location.pathname.replace(/\/?(index\.html)?$/, '/');
fetch(`${folder}splats.spz`).then((answer) => {
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  return answer.arrayBuffer();
}).then(unzip).then((data) => {
  view = makeView(canvas, unpack(data), look, wake, failed);
  new ResizeObserver(wake).observe(canvas);
  wake();
}).catch(failed);
