// Draws Gaussians: WebGL2, no libraries. Shared by the exported page and the viewer's.
//
// A camera has eye, right, down and forward (unit vectors) in the axes of the .spz file, and focal
// and centre in pixels of the canvas. A look has background, low_pass and near, see page.py.
'use strict';

const TEXTURE_WIDTH = 1024, TEXELS = 5;  // 80 bytes a Gaussian: position, shape, 48 of colour.

// --- The .spz file -----------------------------------------------------------------------------

async function unzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Returns the number of Gaussians, their positions, and the content of the texture.
function unpack(data) {
  const view = new DataView(data.buffer);
  const n = view.getUint32(8, true), unit = 2 ** -data[13];
  const at = [16];
  for (const size of [9, 1, 3, 3, 4]) at.push(at[at.length - 1] + size * n);
  const [positions, alphas, colors, scales, turns, sh] = at;
  const rows = Math.max(1, Math.ceil(n * TEXELS / (TEXTURE_WIDTH * TEXELS)));
  const words = new Uint32Array(rows * TEXTURE_WIDTH * TEXELS * 4);
  const floats = new Float32Array(words.buffer), bytes = new Uint8Array(words.buffer);
  const xyz = new Float32Array(3 * n);
  for (let i = 0; i < n; i++) {
    const word = i * TEXELS * 4, byte = word * 4;
    for (let k = 0; k < 3; k++) {
      const p = positions + 9 * i + 3 * k;
      const fixed = (data[p] << 8 | data[p + 1] << 16 | data[p + 2] << 24) >> 8;
      xyz[3 * i + k] = floats[word + k] = fixed * unit;
      bytes[byte + 16 + k] = data[scales + 3 * i + k];
      bytes[byte + 32 + k] = data[colors + 3 * i + k];
    }
    bytes[byte + 19] = data[alphas + i];
    words[word + 5] = view.getUint32(turns + 4 * i, true);
    bytes.set(data.subarray(sh + 45 * i, sh + 45 * i + 45), byte + 35);
  }
  return { n, xyz, words, rows };
}

// --- Sorting by depth, in a worker ---------------------------------------------------------------

// The order depends on the viewing direction only, so that a camera that flies needs no new one.

function sorter() {
  let xyz, n, depth, keys, first, second;
  const count = new Uint32Array(65536);
  // One pass of a radix sort by 16 of the 32 bits of positive floats, which sort like integers.
  function pass(from, to, shift) {
    count.fill(0);
    for (let i = 0; i < n; i++) count[keys[from[i]] >>> shift & 65535]++;
    for (let b = 0, sum = 0; b < 65536; b++) { const c = count[b]; count[b] = sum; sum += c; }
    for (let i = 0; i < n; i++) to[count[keys[from[i]] >>> shift & 65535]++] = from[i];
  }
  onmessage = ({ data }) => {
    if (data.xyz) {
      xyz = data.xyz; n = xyz.length / 3;
      depth = new Float32Array(n); keys = new Uint32Array(depth.buffer);
      first = new Uint32Array(n); second = new Uint32Array(n);
      return;
    }
    const [x, y, z] = data.forward;
    let least = Infinity;
    for (let i = 0; i < n; i++) {
      depth[i] = x * xyz[3 * i] + y * xyz[3 * i + 1] + z * xyz[3 * i + 2];
      least = Math.min(least, depth[i]); first[i] = i;
    }
    for (let i = 0; i < n; i++) depth[i] -= least;
    pass(first, second, 0);
    pass(second, first, 16);
    const order = first.slice().reverse();  // The farthest first.
    postMessage({ order }, [order.buffer]);
  };
}

// --- Drawing -----------------------------------------------------------------------------------

// Projects each Gaussian once, into a texel of two textures: place has its centre and longer half
// axis in pixels, ink its shorter half axis (0: not drawn), its reach in deviations, and its colour.
const PROJECT = `#version 300 es
precision highp float; precision highp int; precision highp usampler2D;
uniform usampler2D table;
uniform mat3 turn;         // World to camera: x right, y down, z forward.
uniform vec3 eye;
uniform vec2 focal, centre, size;  // Pixels.
uniform float lowPass, near;
layout(location = 0) out uvec4 place; layout(location = 1) out uvec4 ink;

uvec4 texel(uint k) {
  ivec2 at = ivec2(gl_FragCoord.xy);
  return texelFetch(table, ivec2(at.x * ${TEXELS} + int(k), at.y), 0);
}
float byteOf(uvec4 a, uvec4 b, uvec4 c, int k) {
  uint word = k < 16 ? a[k / 4] : k < 32 ? b[k / 4 - 4] : c[k / 4 - 8];
  return float(word >> uint(8 * (k % 4)) & 255u);
}
mat3 rotation(uint packed) {  // The three smaller components in x, y, z, w order; see formats.py.
  uint largest = packed >> 30; float q[4]; float sum = 0.0;
  for (int k = 3; k >= 0; k--) {
    if (uint(k) == largest) continue;
    float v = float(packed & 511u) / (511.0 * sqrt(2.0));
    q[k] = (packed & 512u) != 0u ? -v : v; sum += v * v; packed >>= 10;
  }
  q[largest] = sqrt(max(1.0 - sum, 0.0));
  float x = q[0], y = q[1], z = q[2], w = q[3];
  return mat3(1.0 - 2.0 * (y*y + z*z), 2.0 * (x*y + w*z), 2.0 * (x*z - w*y),
              2.0 * (x*y - w*z), 1.0 - 2.0 * (x*x + z*z), 2.0 * (y*z + w*x),
              2.0 * (x*z + w*y), 2.0 * (y*z - w*x), 1.0 - 2.0 * (x*x + y*y));
}
vec3 harmonics(vec3 d) {
  uvec4 a = texel(2u), b = texel(3u), c = texel(4u);
  float x = d.x, y = d.y, z = d.z, xx = x*x, yy = y*y, zz = z*z;
  float basis[15] = float[15](
    -0.48860251*y, 0.48860251*z, -0.48860251*x,
    1.09254843*x*y, -1.09254843*y*z, 0.31539157*(2.0*zz - xx - yy), -1.09254843*x*z, 0.54627422*(xx - yy),
    -0.59004359*y*(3.0*xx - yy), 2.89061144*x*y*z, -0.45704580*y*(4.0*zz - xx - yy),
    0.37317633*z*(2.0*zz - 3.0*xx - 3.0*yy), -0.45704580*x*(4.0*zz - xx - yy),
    1.44530572*z*(xx - yy), -0.59004359*x*(xx - 3.0*yy));
  vec3 rgb;
  for (int c3 = 0; c3 < 3; c3++) {
    float v = 0.5 + 0.28209479 * (byteOf(a, b, c, c3) / 255.0 - 0.5) / 0.15;
    for (int k = 0; k < 15; k++) v += basis[k] * (byteOf(a, b, c, 3 + 3*k + c3) - 128.0) / 128.0;
    rgb[c3] = max(v, 0.0);
  }
  return rgb;
}
void main() {
  place = ink = uvec4(0u);
  uvec4 shape = texel(1u);
  vec3 mean = uintBitsToFloat(texel(0u).xyz), local = turn * (mean - eye);
  if (local.z <= near) return;
  vec2 plane = local.xy / local.z;
  vec3 scale = exp(vec3(shape.x & 255u, shape.x >> 8 & 255u, shape.x >> 16 & 255u) / 16.0 - 10.0);
  mat3 own = turn * rotation(shape.y);
  own[0] *= scale.x; own[1] *= scale.y; own[2] *= scale.z;
  // The perspective is linearised at most a little outside the picture, as in gaussians.py.
  vec2 low = -centre / focal, high = (size - centre) / focal, half_ = 0.65 * (high - low);
  vec2 p = clamp(plane, 0.5 * (low + high) - half_, 0.5 * (low + high) + half_);
  vec3 u = vec3(own[0].x, own[1].x, own[2].x) - p.x * vec3(own[0].z, own[1].z, own[2].z);
  vec3 v = vec3(own[0].y, own[1].y, own[2].y) - p.y * vec3(own[0].z, own[1].z, own[2].z);
  u *= focal.x / local.z; v *= focal.y / local.z;
  float area = length(cross(u, v)), a = dot(u, u), b = dot(u, v), c = dot(v, v);
  float full = area * area + lowPass * (a + c) + lowPass * lowPass;
  float alpha = float(shape.x >> 24) / 255.0 * area / sqrt(full);
  if (alpha < 1.0 / 255.0) return;
  a += lowPass; c += lowPass;
  float middle = 0.5 * (a + c), root = sqrt(max(0.25 * (a - c) * (a - c) + b * b, 0.0));
  vec2 axis = abs(b) > 1e-6 * middle ? normalize(vec2(b, middle + root - a)) : a >= c ? vec2(1, 0) : vec2(0, 1);
  float reach = sqrt(2.0 * log(255.0 * alpha));
  vec2 radii = reach * sqrt(vec2(middle + root, max(middle - root, 1e-6)));
  vec3 rgb = harmonics(normalize(mean - eye));
  place = floatBitsToUint(vec4(focal * plane + centre, radii.x * axis));
  ink = uvec4(floatBitsToUint(vec2(radii.y, reach)), packHalf2x16(rgb.rg), packHalf2x16(vec2(rgb.b, alpha)));
}`;
const VERTEX = `#version 300 es
precision highp float; precision highp int; precision highp usampler2D;
uniform usampler2D orders, places, inks;
uniform vec2 size;  // Pixels.
out vec2 at; out vec4 color;
uvec4 fetch(usampler2D table, uint row) {
  return texelFetch(table, ivec2(row % ${TEXTURE_WIDTH}u, row / ${TEXTURE_WIDTH}u), 0);
}
void main() {  // Two triangles of three vertices each: instances of four are slow on some devices.
  uint row = fetch(orders, uint(gl_VertexID) / 6u).r;
  int k = gl_VertexID % 6, number = k < 3 ? k : k == 3 ? 2 : k == 4 ? 1 : 3;
  vec2 corner = vec2(number & 1, number >> 1) * 2.0 - 1.0;
  vec4 place = uintBitsToFloat(fetch(places, row));
  uvec4 ink = fetch(inks, row);
  vec2 shape = uintBitsToFloat(ink.xy);
  gl_Position = vec4(0.0, 0.0, 2.0, 1.0);  // Outside, unless it is drawn.
  if (shape.x == 0.0) return;
  at = corner * shape.y;
  vec2 side = shape.x * normalize(vec2(-place.w, place.z));
  vec2 pixel = place.xy + corner.x * place.zw + corner.y * side;
  gl_Position = vec4(2.0 * pixel.x / size.x - 1.0, 1.0 - 2.0 * pixel.y / size.y, 0.0, 1.0);
  color = vec4(unpackHalf2x16(ink.z), unpackHalf2x16(ink.w));
}`;
const FRAGMENT = `#version 300 es
precision highp float;
in vec2 at; in vec4 color; out vec4 result;
void main() {
  float alpha = min(color.a * exp(-0.5 * dot(at, at)), 0.99);
  if (alpha < 1.0 / 255.0) discard;
  result = vec4(color.rgb * alpha, alpha);
}`;
const COPY_VERTEX = `#version 300 es
in vec2 corner;
void main() { gl_Position = vec4(corner, 0.0, 1.0); }`;
const COPY_FRAGMENT = `#version 300 es
precision highp float;
uniform sampler2D picture; out vec4 result;
void main() { result = vec4(texelFetch(picture, ivec2(gl_FragCoord.xy), 0).rgb, 1.0); }`;

function makeRenderer(canvas, splats, look) {
  const gl = canvas.getContext('webgl2', { antialias: false, alpha: false });
  if (!gl) throw new Error('This browser has no WebGL 2, which the page needs.');
  function program(vertex, fragment) {
    const result = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text); gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
      gl.attachShader(result, shader);
    }
    gl.bindAttribLocation(result, 0, 'corner');
    gl.linkProgram(result);
    if (!gl.getProgramParameter(result, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(result));
    const uniforms = new Proxy({}, { get: (cache, name) => cache[name] ??= gl.getUniformLocation(result, name) });
    return { program: result, uniforms };
  }
  const project = program(COPY_VERTEX, PROJECT), draw = program(VERTEX, FRAGMENT), copy = program(COPY_VERTEX, COPY_FRAGMENT);
  if (splats.rows > gl.getParameter(gl.MAX_TEXTURE_SIZE)) throw new Error('This device cannot hold so many Gaussians.');
  function texture(format, width, height) {
    const result = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, result);
    gl.texStorage2D(gl.TEXTURE_2D, 1, format, width, height);
    for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, side, gl.NEAREST);
    return result;
  }
  function framebuffer(...targets) {
    const result = gl.createFramebuffer(), points = targets.map((_, k) => gl.COLOR_ATTACHMENT0 + k);
    gl.bindFramebuffer(gl.FRAMEBUFFER, result);
    targets.forEach((target, k) => gl.framebufferTexture2D(gl.FRAMEBUFFER, points[k], gl.TEXTURE_2D, target, 0));
    gl.drawBuffers(points);
    return result;
  }
  const table = texture(gl.RGBA32UI, TEXTURE_WIDTH * TEXELS, splats.rows);
  gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, TEXTURE_WIDTH * TEXELS, splats.rows, gl.RGBA_INTEGER, gl.UNSIGNED_INT, splats.words);
  const orders = texture(gl.R32UI, TEXTURE_WIDTH, splats.rows);
  const [places, inks] = [0, 1].map(() => texture(gl.RGBA32UI, TEXTURE_WIDTH, splats.rows)), projected = framebuffer(places, inks);
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
  gl.enableVertexAttribArray(0); gl.vertexAttribPointer(0, 2, gl.FLOAT, false, 0, 0);
  // Many faint layers add up in 16 bits a channel; 8 would round each of them.
  const fine = gl.getExtension('EXT_color_buffer_float') || gl.getExtension('EXT_color_buffer_half_float');
  let target = null, frame = null;

  function resize() {
    if (!fine) return;
    gl.deleteTexture(target); gl.deleteFramebuffer(frame);  // null is ignored.
    target = texture(gl.RGBA16F, canvas.width, canvas.height); frame = framebuffer(target);
  }
  return {
    resize,
    order(rows) {  // All whole lines of the texture, and the last one.
      const lines = Math.floor(rows.length / TEXTURE_WIDTH), rest = rows.length % TEXTURE_WIDTH;
      const put = (y, w, h, part) => { if (w * h) gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, y, w, h, gl.RED_INTEGER, gl.UNSIGNED_INT, part); };
      gl.bindTexture(gl.TEXTURE_2D, orders);
      put(0, TEXTURE_WIDTH, lines, rows); put(lines, rest, 1, rows.subarray(lines * TEXTURE_WIDTH));
    },
    draw(camera) {
      const { right, down, forward } = camera;
      gl.disable(gl.BLEND);
      gl.bindFramebuffer(gl.FRAMEBUFFER, projected); gl.viewport(0, 0, TEXTURE_WIDTH, splats.rows);
      gl.useProgram(project.program); gl.bindTexture(gl.TEXTURE_2D, table);
      const u = project.uniforms;
      gl.uniformMatrix3fv(u.turn, false, [0, 1, 2].flatMap((k) => [right[k], down[k], forward[k]]));
      gl.uniform3fv(u.eye, camera.eye);
      gl.uniform2fv(u.focal, camera.focal); gl.uniform2fv(u.centre, camera.centre);
      gl.uniform2f(u.size, canvas.width, canvas.height);
      gl.uniform1f(u.lowPass, look.low_pass); gl.uniform1f(u.near, look.near);
      gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);

      gl.bindFramebuffer(gl.FRAMEBUFFER, frame); gl.viewport(0, 0, canvas.width, canvas.height);
      gl.clearColor(...look.background, 1); gl.clear(gl.COLOR_BUFFER_BIT);
      gl.useProgram(draw.program);
      Object.entries({ inks, places, orders }).forEach(([name, content], k) => {
        gl.activeTexture(gl.TEXTURE2 - k); gl.bindTexture(gl.TEXTURE_2D, content); gl.uniform1i(draw.uniforms[name], 2 - k);
      });  // Ends with texture 0, which all else uses.
      gl.uniform2f(draw.uniforms.size, canvas.width, canvas.height);
      gl.enable(gl.BLEND); gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
      gl.drawArrays(gl.TRIANGLES, 0, 6 * splats.n);
      if (!fine) return;
      gl.bindFramebuffer(gl.FRAMEBUFFER, null);
      gl.disable(gl.BLEND); gl.useProgram(copy.program); gl.bindTexture(gl.TEXTURE_2D, target);
      gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
    },
  };
}

// Pictures that take longer than SLOW while the camera moves are drawn coarser, with half of the
// pixels in each step. When it has rested, the picture is drawn as fine as the screen.
const SLOW = 40, FAST = 20, REST = 200, COARSEST = 5;  // Milliseconds; steps.

// Draws into a canvas and sorts meanwhile; `woken` is called when there is something new to draw,
// and `failed` with an error of the worker that sorts.
function makeView(canvas, splats, look, woken, failed) {
  const renderer = makeRenderer(canvas, splats, look);
  const source = URL.createObjectURL(new Blob([`(${sorter})()`], { type: 'text/javascript' }));
  const worker = new Worker(source);
  worker.postMessage({ xyz: splats.xyz }, [splats.xyz.buffer]);
  let sorting = false, sorted = '', stale = true, ready = false;
  worker.onmessage = ({ data }) => { renderer.order(data.order); sorting = false; stale = ready = true; woken(); };
  worker.onerror = failed;

  let moving = false, moved = 0, frames = 0, last = 0;  // When the camera moved; frames since; the last picture.
  let coarse = 0, pace = (SLOW + FAST) / 2;  // Steps; milliseconds a picture.
  function adapt(now) {
    if (last) pace += 0.3 * (Math.min(now - last, 1000) - pace);
    last = now;
    if (pace <= SLOW || coarse === COARSEST) return;
    coarse = Math.min(COARSEST, coarse + Math.ceil(Math.log2(pace / SLOW))); pace = (SLOW + FAST) / 2;
  }
  function rests() {  // The next movement tries to be finer if this one was fast.
    if (pace < FAST && coarse) { coarse--; pace = (SLOW + FAST) / 2; }
    moving = false; last = 0; stale = true;
  }
  return {
    // Gives the canvas its size. To be called in every frame, before the camera's lens is computed.
    fit() {
      if (moving && ++frames > 2 && performance.now() - moved > REST) rests();
      if (moving) woken();
      const scale = devicePixelRatio * (moving ? 2 ** (-coarse / 2) : 1);
      const width = Math.max(1, Math.round(canvas.clientWidth * scale)), height = Math.max(1, Math.round(canvas.clientHeight * scale));
      if (width === canvas.width && height === canvas.height) return;
      canvas.width = width; canvas.height = height; renderer.resize(); stale = true;
    },
    change() { stale = moving = true; moved = performance.now(); frames = 0; },  // The camera has changed.
    // Draws if anything has changed; returns whether it did. Sorts for the camera if that is due.
    draw(camera) {
      const key = camera.forward.join();
      if (!sorting && key !== sorted) {
        sorting = true; sorted = key;
        worker.postMessage({ forward: camera.forward });
      }
      if (!stale || !ready) return false;
      renderer.draw(camera); stale = false;
      if (moving) adapt(performance.now());
      return true;
    },
    order() { return sorting || moving ? '' : sorted; },  // What the drawn picture was sorted for; '' while it may still change.
  };
}

// --- Vectors -----------------------------------------------------------------------------------

const add = (a, b, s = 1) => a.map((x, k) => x + s * b[k]);
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const unit = (a) => { const s = Math.hypot(...a) || 1; return a.map((x) => x / s); };
function turned(v, axis, angle) {  // Rodrigues' rotation.
  const c = Math.cos(angle), s = Math.sin(angle), side = cross(axis, v), along = dot(axis, v) * (1 - c);
  return v.map((x, k) => c * x + s * side[k] + along * axis[k]);
}

