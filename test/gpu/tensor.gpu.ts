/** @lc/tensor on a GPU, held against f64. A bf16 result may be at most twice as far off as the rounded exact one. */
import {
  add,
  addBias,
  axpy,
  copy,
  cublasLt,
  type DType,
  defaultStream,
  deviceMemory,
  devices,
  Event,
  embeddingGather,
  embeddingScatterAdd,
  empty,
  fill,
  fromTypedArray,
  gemm,
  groupedGemm,
  groupedGemmWeightGrad,
  isPinned,
  loadAddon,
  memInfo,
  processMemory,
  requireDevice,
  rmsNorm,
  rmsNormBackward,
  Stream,
  scale,
  sumRows,
  type Tensor,
  zeros,
} from '@lc/tensor';
import { randomNormal as random } from '../../packages/tensor/src/seeded.js';
import { chooseKernels } from '../../packages/trainer/src/bench/kernels.js';
import { assert, largeTest, small, test, thin } from './harness.js';

const count = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);

interface Pair {
  gpu: Tensor;
  /** What the GPU holds, in f32. */
  values: Float32Array;
}
/** Random values of a dtype, on the GPU and here. `pad`: extra columns, so that rows are strided. */
function make(shape: number[], dtype: 'f32' | 'bf16', seed: number, pad = 0): Pair {
  const last = shape.at(-1) as number;
  const padded = [...shape.slice(0, -1), last + pad];
  using source = fromTypedArray(random(count(padded), seed), padded);
  using low = empty(padded, { dtype });
  copy(low, source);
  const gpu = empty(padded, { dtype, device: 'cuda' });
  copy(gpu, low);
  using back = empty(padded);
  copy(back, low);
  const view = pad ? gpu.slice(shape.length - 1, 0, last) : gpu;
  const all = back.data();
  const values = pad
    ? Float32Array.from({ length: count(shape) }, (_, i) => all[Math.floor(i / last) * (last + pad) + (i % last)] as number)
    : all.slice();
  return { gpu: view, values };
}
async function fetch(t: Tensor): Promise<Float32Array> {
  using packed = empty(t.shape, { device: 'cuda' });
  copy(packed, t); // to f32, on the device
  return await packed.read();
}
const bf16 = (v: number): number => {
  const f = Float32Array.of(v);
  const u = new Uint32Array(f.buffer);
  u[0] = (((u[0] as number) + 0x7fff + (((u[0] as number) >>> 16) & 1)) & 0xffff0000) >>> 0;
  return f[0] as number;
};
/** |got - want| <= 2 |rounded(want) - want| + what f32 sums of `terms` magnitude may lose. */
function close(
  what: string,
  got: ArrayLike<number>,
  want: ArrayLike<number>,
  dtype: DType,
  magnitude: (i: number) => number,
  terms: number,
): void {
  assert(got.length === want.length, `${what}: ${got.length} values, expected ${want.length}`);
  for (let i = 0; i < want.length; i++) {
    const w = want[i] as number;
    const rounding = dtype === 'bf16' ? 2 * Math.max(Math.abs(bf16(w) - w), Math.abs(w) * 2 ** -9) : 0;
    const allowed = rounding + magnitude(i) * 2 ** -23 * (4 + Math.sqrt(terms));
    const error = Math.abs((got[i] as number) - w);
    // (Written so that no message is made for the millions that are right.)
    if (!(error <= allowed)) assert(false, `${what}[${i}]: got ${got[i]}, expected ${w}, allowed ${allowed}`);
  }
}

test('devices and errors', () => {
  const gpu = devices().find((d) => d.device === 'cuda:0');
  assert(gpu !== undefined, 'no cuda:0 in devices()');
  console.log(
    `     ${gpu.name}, compute ${gpu.computeCapability}, driver CUDA ${gpu.driver}, ${(gpu.totalBytes / 2 ** 30).toFixed(1)} GiB, ${((gpu.totalBytes - gpu.freeBytes) / 2 ** 20).toFixed(0)} MiB taken by the context; cuBLASLt: ${cublasLt() ?? 'not found'}`,
  );
  let code = '';
  try {
    requireDevice('cuda:9');
  } catch (error) {
    code = (error as { code: string }).code;
  }
  assert(code === 'ERR_LC_NO_DEVICE', `cuda:9 gave ${code}`);
  if (small) return; // compute-sanitizer would report the driver's refusal
  try {
    empty([2 ** 40], { device: 'cuda' });
  } catch (error) {
    code = (error as { code: string }).code;
  }
  assert(code === 'ERR_LC_OUT_OF_MEMORY', `4 TiB gave ${code}`);
});

test('memory: zeros, fill, pinned copies, counters, pool', async () => {
  const before = deviceMemory('cuda').liveBytes;
  {
    using a = zeros([1000, 333], { device: 'cuda', label: 'probe' });
    assert(
      (await a.read()).every((v) => v === 0),
      'zeros are not zero',
    );
    fill(a, 2.5);
    assert(
      (await a.read()).every((v) => v === 2.5),
      'fill',
    );
    using host = empty([1000, 333], { device: 'host' });
    assert(isPinned(host), 'host memory is not pinned');
    host.data().set(random(333000, 1));
    copy(a, host);
    const back = await a.read();
    assert(
      back.every((v, i) => v === host.data()[i]),
      'host to device and back',
    );
    assert(deviceMemory('cuda').byLabel.probe?.liveBytes === 1000 * 333 * 4, 'label counter');
  }
  assert(deviceMemory('cuda').liveBytes === before, 'live bytes after dispose');
  const { bytes } = processMemory('cuda');
  for (let i = 0; i < 100; i++) empty([64 << 20], { dtype: 'u8', device: 'cuda' }).dispose();
  await defaultStream('cuda').sync();
  assert(processMemory('cuda').bytes <= bytes + (128 << 20), 'the pool does not give memory back to itself');
});

test('streams and events order copies', async () => {
  using s1 = new Stream('cuda');
  using s2 = new Stream('cuda');
  using e = new Event('cuda');
  using host = empty([1 << 22], { device: 'host' });
  using out = empty([1 << 22], { device: 'host' });
  using gpu = empty([1 << 22], { device: 'cuda' });
  host.data().set(random(1 << 22, 3));
  await defaultStream('cuda').sync();
  for (let round = 0; round < 5; round++) {
    host.data()[round] = round + 100;
    s1.copy(gpu, host);
    e.record(s1);
    s2.wait(e);
    s2.copy(out, gpu);
    await s2.sync();
    assert(e.query(), 'event not done after its stream');
    const [sent, came] = [host.data(), out.data()];
    assert(came[round] === round + 100 && came.every((v, i) => v === sent[i]), `round ${round}`);
  }
});

test('casts match the CPU bit for bit, strided too', async () => {
  const dtypes: DType[] = ['f32', 'bf16', 'f16', 'i32', 'i64', 'u8'];
  const values = Float32Array.from([
    ...random(300, 5),
    0,
    -0,
    1e9,
    -3e9,
    65520,
    300,
    -1,
    Number.NaN,
    Number.POSITIVE_INFINITY,
    1e-40,
    2.5,
    3.5,
  ]);
  values.forEach((v, i) => {
    if (i % 3 === 0) values[i] = v * 1000;
  });
  for (const from of dtypes) {
    for (const to of dtypes) {
      using source = fromTypedArray(values, [values.length / 4, 4]);
      using a = empty(source.shape, { dtype: from });
      copy(a, source);
      using want = empty(source.shape, { dtype: to });
      copy(want, a);
      using ga = empty(source.shape, { dtype: from, device: 'cuda' });
      copy(ga, a);
      using wide = zeros([source.shape[0] as number, 7], { dtype: to, device: 'cuda' });
      copy(wide.slice(1, 2, 4), ga);
      using got = empty(source.shape, { dtype: to, device: 'cuda' });
      copy(got, wide.slice(1, 2, 4));
      const [g, w] = [await got.read<Uint8Array>(), await want.read<Uint8Array>()];
      for (let i = 0; i < w.length; i++) {
        const nan = (to === 'bf16' && ((w[i] as number) & 0x7fff) > 0x7f80) || (to === 'f16' && ((w[i] as number) & 0x7fff) > 0x7c00);
        const same = Object.is(g[i], w[i]) || (nan && ((g[i] as number) & 0x7f80) >= 0x7c00);
        assert(same, `${from} -> ${to} [${i}]: ${g[i]}, expected ${w[i]} from ${values[i]}`);
      }
    }
  }
});

for (const dtype of ['f32', 'bf16'] as const) {
  test(`row ops, ${dtype}`, async () => {
    for (const [rows, width, pad] of [
      [1, 7, 0],
      [7, 2880, 0],
      [131, 192, 8],
      [300, 33, 3],
    ] as const) {
      const name = `${dtype} ${rows}x${width}`;
      const x = make([rows, width], dtype, 1, pad);
      const y = make([rows, width], dtype, 2);
      const w = make([width], dtype, 3);
      using out = empty([rows, width], { dtype, device: 'cuda' });
      const X = (i: number): number => x.values[i] as number;
      const Y = (i: number): number => y.values[i] as number;
      const W = (i: number): number => w.values[i % width] as number;
      const mapped = (fn: (i: number) => number): Float64Array => Float64Array.from({ length: rows * width }, (_, i) => fn(i));
      add({ a: x.gpu, b: y.gpu, out });
      close(
        `add ${name}`,
        await fetch(out),
        mapped((i) => X(i) + Y(i)),
        dtype,
        (i) => Math.abs(X(i)) + Math.abs(Y(i)),
        2,
      );
      copy(out, x.gpu);
      addBias({ x: out, bias: w.gpu });
      close(
        `addBias ${name}`,
        await fetch(out),
        mapped((i) => X(i) + W(i)),
        dtype,
        (i) => Math.abs(X(i)) + Math.abs(W(i)),
        2,
      );
      copy(out, x.gpu);
      axpy({ x: y.gpu, y: out, alpha: -1.5 });
      close(
        `axpy ${name}`,
        await fetch(out),
        mapped((i) => X(i) - 1.5 * Y(i)),
        dtype,
        (i) => Math.abs(X(i)) + 1.5 * Math.abs(Y(i)),
        2,
      );
      copy(out, x.gpu);
      scale({ x: out, factor: 0.3 });
      close(
        `scale ${name}`,
        await fetch(out),
        mapped((i) => X(i) * Math.fround(0.3)),
        dtype,
        (i) => Math.abs(X(i)),
        2,
      );
      using sums = zeros([width], { device: 'cuda' });
      sumRows({ x: x.gpu, out: sums, accumulate: true });
      const sum = new Float64Array(width);
      const magnitude = new Float64Array(width);
      for (let i = 0; i < rows * width; i++) {
        sum[i % width] = (sum[i % width] as number) + X(i);
        magnitude[i % width] = (magnitude[i % width] as number) + Math.abs(X(i));
      }
      close(`sumRows ${name}`, await fetch(sums), sum, 'f32', (i) => magnitude[i] as number, rows);

      const inverse = Float64Array.from(
        { length: rows },
        (_, r) => 1 / Math.sqrt(x.values.subarray(r * width, (r + 1) * width).reduce((s, v) => s + v * v, 0) / width + 1e-5),
      );
      rmsNorm({ x: x.gpu, weight: w.gpu, out, eps: 1e-5 });
      close(
        `rmsNorm ${name}`,
        await fetch(out),
        mapped((i) => X(i) * (inverse[Math.floor(i / width)] as number) * W(i)),
        dtype,
        (i) => Math.abs(X(i) * W(i)) * (inverse[Math.floor(i / width)] as number),
        width,
      );
      using dWeight = zeros([width], { device: 'cuda' });
      rmsNormBackward({ x: x.gpu, weight: w.gpu, dout: y.gpu, dx: out, eps: 1e-5, dWeight });
      const projection = Float64Array.from({ length: rows }, (_, r) => {
        let s = 0;
        for (let j = 0; j < width; j++) s += X(r * width + j) * Y(r * width + j) * W(j);
        return s;
      });
      const dx = mapped((i) => {
        const r = Math.floor(i / width);
        const v = inverse[r] as number;
        return v * (Y(i) * W(i) - (X(i) * v * v * (projection[r] as number)) / width);
      });
      close(
        `rmsNormBackward ${name}`,
        await fetch(out),
        dx,
        dtype,
        (i) => (inverse[Math.floor(i / width)] as number) * (Math.abs(Y(i) * W(i)) + Math.abs(X(i)) * 3),
        width,
      );
      const dw = new Float64Array(width);
      const dwMagnitude = new Float64Array(width);
      for (let i = 0; i < rows * width; i++) {
        const term = X(i) * Y(i) * (inverse[Math.floor(i / width)] as number);
        dw[i % width] = (dw[i % width] as number) + term;
        dwMagnitude[i % width] = (dwMagnitude[i % width] as number) + Math.abs(term);
      }
      close(`dWeight ${name}`, await fetch(dWeight), dw, 'f32', (i) => dwMagnitude[i] as number, rows + width);

      using ids = empty([rows], { dtype: 'i32', device: 'cuda' });
      const idValues = Int32Array.from({ length: rows }, (_, i) => (i * 5) % 11);
      using idHost = fromTypedArray(idValues, [rows]);
      copy(ids, idHost);
      const table = make([11, width], dtype, 9);
      embeddingGather({ table: table.gpu, ids, out });
      const gathered = await fetch(out);
      assert(
        gathered.every((v, i) => v === table.values[(idValues[Math.floor(i / width)] as number) * width + (i % width)]),
        `gather ${name}`,
      );
      using dTable = zeros([11, width], { device: 'cuda' });
      embeddingScatterAdd({ dout: y.gpu, ids, dTable });
      const scattered = new Float64Array(11 * width);
      for (let i = 0; i < rows * width; i++) {
        const at = (idValues[Math.floor(i / width)] as number) * width + (i % width);
        scattered[at] = (scattered[at] as number) + Y(i);
      }
      close(`scatter ${name}`, await fetch(dTable), scattered, 'f32', () => 4 * Math.sqrt(rows), rows);
    }
  });
}

function gemmReference(
  a: Float32Array,
  b: Float32Array,
  m: number,
  n: number,
  k: number,
  ta: boolean,
  tb: boolean,
): { sum: Float64Array; magnitude: Float64Array } {
  const sum = new Float64Array(m * n);
  const magnitude = new Float64Array(m * n);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      let s = 0;
      let q = 0;
      for (let p = 0; p < k; p++) {
        const term = (a[ta ? p * m + i : i * k + p] as number) * (b[tb ? j * k + p : p * n + j] as number);
        s += term;
        q += Math.abs(term);
      }
      sum[i * n + j] = s;
      magnitude[i * n + j] = q;
    }
  }
  return { sum, magnitude };
}

/** A test of lc's own bf16 GEMM: the portable kernel, and what this card's best one is. */
function gemmTest(name: string, fn: () => Promise<void>): void {
  for (const kernel of ['portable', 'best'] as const)
    test(`${name}, ${kernel} kernel`, async () => {
      using _ = chooseKernels(kernel === 'best' ? {} : { LCTX_GEMM: kernel });
      await fn();
    });
}

for (const [dtype, cType, backend] of [
  ['bf16', 'bf16', 1],
  ['bf16', 'f32', 1],
  ['f32', 'f32', 1],
  ['bf16', 'bf16', 2],
  ['bf16', 'f32', 2],
  ['f32', 'f32', 2],
] as const) {
  (backend === 1 && dtype === 'bf16' ? gemmTest : test)(`gemm ${dtype} -> ${cType}, ${backend === 1 ? 'own' : 'cuBLASLt'}`, async () => {
    if (backend === 2 && !cublasLt()) return console.log('     skipped: no cuBLASLt');
    let seed = 0;
    for (const [m, n, k] of [
      [1, 1, 1],
      [7, 5, 3],
      [128, 128, 64],
      [131, 257, 72],
      [64, 200, 300],
      [300, 24, 136],
    ] as const) {
      for (const ta of [false, true]) {
        for (const tb of [false, true]) {
          seed += 3;
          if (backend === 2 && (n % 8 || k % 8 || m % 8)) continue; // its kernels want 16-byte rows
          const pad = seed % 2 ? 0 : 8;
          const a = make(ta ? [k, m] : [m, k], dtype, seed, pad);
          const b = make(tb ? [n, k] : [k, n], dtype, seed + 1, pad);
          const c = make([m, n], cType, seed + 2);
          const { sum, magnitude } = gemmReference(a.values, b.values, m, n, k, ta, tb);
          const beta = seed % 4 ? 0 : 0.5;
          const alpha = seed % 3 ? 1 : -0.75;
          gemm({ a: a.gpu, b: b.gpu, c: c.gpu, transA: ta, transB: tb, alpha, beta, backend });
          const want = sum.map((s, i) => alpha * s + beta * (c.values[i] as number));
          close(
            `${m}x${n}x${k} ${ta} ${tb}`,
            await fetch(c.gpu),
            want,
            cType,
            (i) => (magnitude[i] as number) + Math.abs(c.values[i] as number),
            k,
          );
        }
      }
    }
  });
}

for (const [backend, name] of [
  [0, 'best'],
  [1, 'own'],
  [2, 'cuBLASLt'],
] as const) {
  for (const [dtype, cType, biasType] of [
    ['bf16', 'bf16', 'bf16'],
    ['bf16', 'bf16', 'f32'],
    ['bf16', 'f32', 'f32'],
    ['f32', 'f32', 'f32'],
  ] as const) {
    test(`gemm with a bias, ${name}: ${dtype} -> ${cType}, ${biasType}`, async () => {
      if (backend === 2 && !cublasLt()) return console.log('     skipped: no cuBLASLt');
      let seed = 700 + 100 * backend;
      for (const [m, n, k] of [
        [40, 24, 72],
        [264, 512, 96],
        [7, 13, 20],
      ] as const) {
        if (backend === 2 && n % 8) continue; // its kernels want 16-byte rows
        seed += 5;
        const [a, b, c] = [make([m, k], dtype, seed), make([n, k], dtype, seed + 1), make([m, n], cType, seed + 2)];
        const { sum, magnitude } = gemmReference(a.values, b.values, m, n, k, false, true);
        // Twice, with another bias of the same size: a library's plan must not keep the first one.
        for (const beta of [0, 0.5]) {
          const bias = make([n], biasType, seed + (beta === 0 ? 3 : 4));
          const before = await fetch(c.gpu);
          gemm({ a: a.gpu, b: b.gpu, c: c.gpu, transB: true, beta, bias: bias.gpu, backend });
          const got = await fetch(c.gpu);
          for (let j = 0; j < m * n; j++) {
            const product = (sum[j] as number) + beta * (before[j] as number);
            const want = product + (bias.values[j % n] as number);
            // bf16 rounds the product, where the bias comes after it, and the sum.
            const rounding = cType === 'bf16' ? 2 ** -8 * (Math.abs(product) + Math.abs(want)) : 0;
            const f32 = ((magnitude[j] as number) + Math.abs(before[j] as number) + Math.abs(want)) * 2 ** -23 * (4 + Math.sqrt(k));
            const error = Math.abs((got[j] as number) - want);
            if (!(error <= rounding + f32)) assert(false, `${m}x${n}x${k} beta ${beta} [${j}]: got ${got[j]}, expected ${want}`);
          }
        }
      }
    });
  }
}

largeTest('gemm: large shapes, sampled rows; the same bits twice', async () => {
  const [m, n, k] = [4096, 2880, 4096];
  const a = make([m, k], 'bf16', 1);
  const b = make([n, k], 'bf16', 2);
  for (const backend of cublasLt() ? ([1, 2] as const) : ([1] as const)) {
    using c = empty([m, n], { dtype: 'f32', device: 'cuda' });
    using again = empty([m, n], { dtype: 'f32', device: 'cuda' });
    gemm({ a: a.gpu, b: b.gpu, c, transB: true, backend });
    gemm({ a: a.gpu, b: b.gpu, c: again, transB: true, backend });
    for (const row of [0, 1777, 4095]) {
      const { sum, magnitude } = gemmReference(a.values.subarray(row * k, (row + 1) * k), b.values, 1, n, k, false, true);
      close(`backend ${backend} row ${row}`, await fetch(c.rows(row, 1)), sum, 'f32', (i) => magnitude[i] as number, k);
    }
    const [x, y] = [await c.read(), await again.read()];
    assert(
      x.every((v, i) => v === y[i]),
      `backend ${backend}: bits differ between two runs`,
    );
  }
});

for (const dtype of ['bf16', 'f32'] as const) {
  (dtype === 'bf16' ? gemmTest : test)(`grouped gemm, ${dtype}`, async () => {
    for (const offsets of [
      [0, 7, 7, 140, 300],
      [0, 0, 0, 131],
      [0, 1, 2, 3, 4, 5, 6, 7, 8],
    ]) {
      const experts = offsets.length - 1;
      const rows = offsets[experts] as number;
      const [k, n] = [72, 136];
      using at = empty([experts + 1], { dtype: 'i32', device: 'cuda' });
      using host = fromTypedArray(Int32Array.from(offsets), [experts + 1]);
      copy(at, host);
      const a = make([rows, k], dtype, 1);
      const g = make([rows, n], dtype, 2);
      for (const transB of [false, true]) {
        const b = make(transB ? [experts, n, k] : [experts, k, n], dtype, 3);
        using c = empty([rows, n], { dtype, device: 'cuda' });
        groupedGemm({ a: a.gpu, b: b.gpu, c, offsets: at, transB });
        const got = await fetch(c);
        for (let e = 0; e < experts; e++) {
          const [first, last] = [offsets[e] as number, offsets[e + 1] as number];
          const { sum, magnitude } = gemmReference(
            a.values.subarray(first * k, last * k),
            b.values.subarray(e * k * n, (e + 1) * k * n),
            last - first,
            n,
            k,
            false,
            transB,
          );
          close(`expert ${e} ${transB}`, got.subarray(first * n, last * n), sum, dtype, (i) => magnitude[i] as number, k);
        }
      }
      const dw = make([experts, k, n], 'f32', 4);
      groupedGemmWeightGrad({ a: a.gpu, b: g.gpu, c: dw.gpu, offsets: at, beta: 1 });
      const got = await fetch(dw.gpu);
      for (let e = 0; e < experts; e++) {
        const [first, last] = [offsets[e] as number, offsets[e + 1] as number];
        const { sum, magnitude } = gemmReference(
          a.values.subarray(first * k, last * k),
          g.values.subarray(first * n, last * n),
          k,
          n,
          last - first,
          true,
          false,
        );
        const before = dw.values.subarray(e * k * n, (e + 1) * k * n);
        close(
          `dW ${e}`,
          got.subarray(e * k * n, (e + 1) * k * n),
          sum.map((s, i) => s + (before[i] as number)),
          'f32',
          (i) => (magnitude[i] as number) + Math.abs(before[i] as number),
          last - first,
        );
      }
    }
  });
}

interface ScaleAddon {
  scale(args: { x: Tensor; factor: number; stream: Stream }): void;
  record(args: { event: Event; stream: Stream }): void;
  wait(args: { event: Event; stream: Stream }): void;
}
test('two separately built addons share memory, streams and events', async () => {
  using s1 = new Stream('cuda');
  using s2 = new Stream('cuda');
  using e1 = new Event('cuda');
  using e2 = new Event('cuda');
  using x = zeros([small ? 1 << 16 : 1 << 24], { device: 'cuda' });
  fill(x, 1);
  await defaultStream('cuda').sync();
  for (const name of ['@lc/gpu-addon-a', '@lc/gpu-addon-b']) {
    const free = memInfo('cuda').freeBytes;
    const start = performance.now();
    const addon = loadAddon<ScaleAddon>({ packageName: name, from: import.meta.url })();
    const loaded = performance.now();
    addon.scale({ x: x.rows(0, 1), factor: 1, stream: s1 });
    await s1.sync();
    console.log(
      `     ${name}: load ${(loaded - start).toFixed(1)} ms, first launch ${(performance.now() - loaded).toFixed(1)} ms, VRAM ${((free - memInfo('cuda').freeBytes) / 2 ** 20).toFixed(1)} MiB`,
    );
  }
  const a = loadAddon<ScaleAddon>({ packageName: '@lc/gpu-addon-a', from: import.meta.url })();
  const b = loadAddon<ScaleAddon>({ packageName: '@lc/gpu-addon-b', from: import.meta.url })();
  // A on one stream, B on another, @lc/tensor on its own; order only through events of @lc/tensor that the addons record and wait for.
  for (let round = 0; round < 20; round++) {
    a.scale({ x, factor: 2, stream: s1 });
    a.record({ event: e1, stream: s1 });
    b.wait({ event: e1, stream: s2 });
    b.scale({ x, factor: 0.5, stream: s2 });
    b.record({ event: e2, stream: s2 });
    s1.wait(e2);
  }
  defaultStream('cuda').wait(e2);
  scale({ x, factor: 3 });
  assert(
    (await x.read()).every((v) => v === 3),
    'wrong values: work was not ordered, or memory not shared',
  );
});

test('streams and events: disposed ones are refused; one that is waited for is freed afterwards', async () => {
  const refused = (fn: () => void): void => {
    let code = '';
    try {
      fn();
    } catch (error) {
      code = (error as { code: string }).code;
    }
    assert(code === 'ERR_LC_DISPOSED', `gave ${code || 'no error'}`);
  };
  const stream = new Stream('cuda');
  const event = new Event('cuda');
  using x = zeros([1 << 26], { device: 'cuda' });
  await defaultStream('cuda').sync();
  scale({ x, factor: 2, stream });
  event.record(stream);
  const waits = [stream.sync(), event.sync()];
  stream.dispose();
  event.dispose();
  refused(() => scale({ x, factor: 2, stream }));
  refused(() => event.query());
  refused(() => event.record(defaultStream('cuda')));
  await Promise.all(waits);
  const before = processMemory('cuda').bytes;
  for (let i = 0; i < 50; i++) {
    using s = new Stream('cuda');
    using a = make([64, 64], 'bf16', 1).gpu;
    using c = empty([64, 64], { dtype: 'bf16', device: 'cuda' });
    await defaultStream('cuda').sync();
    gemm({ a, b: a, c, stream: s });
    s.synchronize();
  }
  assert(processMemory('cuda').bytes < before + (64 << 20), 'streams that are gone keep memory');
});

gemmTest('gemm: large tiles, all transposes, edges', async () => {
  // A small run has each side transposed once.
  const [m, n, k] = [2312, 1416, small ? 72 : 200];
  for (const ta of [false, true]) {
    for (const tb of small ? [!ta] : [false, true]) {
      for (const cType of small ? (['bf16'] as const) : (['bf16', 'f32'] as const)) {
        const a = make(ta ? [k, m] : [m, k], 'bf16', 1);
        const b = make(tb ? [n, k] : [k, n], 'bf16', 2);
        using c = make([m, n], cType, 3).gpu;
        using before = empty([m, n], { dtype: cType, device: 'cuda' });
        copy(before, c);
        gemm({ a: a.gpu, b: b.gpu, c, transA: ta, transB: tb, alpha: 0.5, beta: 0.25, backend: 1 });
        for (const row of [0, 63, 64, 255, 256, 1111, 2303, 2304, 2311]) {
          const one = Float32Array.from({ length: k }, (_, i) => a.values[ta ? i * m + row : row * k + i] as number);
          const { sum, magnitude } = gemmReference(one, b.values, 1, n, k, false, tb);
          const old = await fetch(before.rows(row, 1));
          close(
            `${cType} ${ta} ${tb} row ${row}`,
            await fetch(c.rows(row, 1)),
            sum.map((s, i) => 0.5 * s + 0.25 * (old[i] as number)),
            cType,
            (i) => (magnitude[i] as number) + Math.abs(old[i] as number),
            k,
          );
        }
      }
    }
  }
});

test('embedding gradient: few and many tokens of an id, more than are ranked at once; the same bits twice', async () => {
  for (const [n, width, vocab, dtype] of [
    [33, 7, 5, 'f32'],
    [small ? 700 : 17_000, 24, 300, 'bf16'],
    [16_385, small ? 2 : 9, 3, 'bf16'],
  ] as const) {
    const dout = make([n, width], dtype, 1);
    // One id has a third of the tokens, another nearly none.
    const idValues = Int32Array.from({ length: n }, (_, i) => (i % 3 ? (i * i + 5 * i) % vocab : 1));
    using ids = empty([n], { dtype: 'i32', device: 'cuda' });
    using idHost = fromTypedArray(idValues, [n]);
    copy(ids, idHost);
    const table = make([vocab, width], 'f32', 2);
    using again = empty([vocab, width], { device: 'cuda' });
    copy(again, table.gpu);
    embeddingScatterAdd({ dout: dout.gpu, ids, dTable: table.gpu });
    embeddingScatterAdd({ dout: dout.gpu, ids, dTable: again });
    const want = Float64Array.from(table.values);
    const magnitude = want.map(Math.abs);
    const terms = new Int32Array(vocab);
    dout.values.forEach((v, i) => {
      const id = idValues[Math.floor(i / width)] as number;
      const to = id * width + (i % width);
      want[to] = (want[to] as number) + v;
      magnitude[to] = (magnitude[to] as number) + Math.abs(v);
      if (i % width === 0) terms[id] = (terms[id] as number) + 1;
    });
    const [got, same] = [await fetch(table.gpu), await fetch(again)];
    close(`${n} x ${width}`, got, want, 'f32', (i) => magnitude[i] as number, Math.max(...terms));
    assert(
      got.every((v, i) => v === same[i]),
      `${n} x ${width}: bits differ between two runs`,
    );
  }
});

// bf16 by f32, and f32 by f32, with one narrow side: by tensor cores, yet as exact as f32.
test('gemm: narrow products', async () => {
  type Operand = 'bf16' | 'f32';
  const cases: [m: number, n: number, k: number, a: Operand, b: Operand, c: Operand, transA: boolean, transB: boolean][] = [];
  // x A^T, d B, a router: rows of x against few columns.
  for (const [m, n, k] of [
    [1, 1, 1],
    [7, 8, 64],
    [131, 8, 2880],
    [131, 13, 333],
    [257, 32, 520],
    [70, 128, 104],
    [6200, 8, 96],
    [6200, 33, 40],
  ] as const) {
    for (const transB of [true, false]) cases.push([m, n, k, 'bf16', 'f32', m % 2 ? 'f32' : 'bf16', false, transB]);
  }
  // h B^T, d A: few k.
  for (const [m, n, k] of [
    [1, 1, 1],
    [7, 72, 8],
    [131, 257, 5],
    [131, 512, 8],
    [300, 264, 16],
    [131, 77, 13],
    [77, 1000, 32],
    [131, 328, 64],
    [40, 104, 100],
  ] as const) {
    for (const transB of [true, false]) for (const c of ['bf16', 'f32'] as const) cases.push([m, n, k, 'f32', 'f32', c, false, transB]);
  }
  // x^T d and d^T x: gradients, over a few and over many tokens.
  for (const [wide, rank, k] of [
    [1, 1, 1],
    [131, 7, 131],
    [264, 8, 4096],
    [200, 16, 5003],
    [72, 33, 2049],
    [328, 64, 700],
  ] as const) {
    cases.push([wide, rank, k, 'bf16', 'f32', 'f32', true, false], [rank, wide, k, 'f32', 'bf16', 'f32', true, false]);
  }
  for (const [i, [m, n, k, aType, bType, cType, transA, transB]] of thin([...cases.entries()], 3)) {
    for (const pad of thin([0, 8, 3], 2)) {
      const a = make(transA ? [k, m] : [m, k], aType, 3 * i, pad);
      const b = make(transB ? [n, k] : [k, n], bType, 3 * i + 1, pad);
      const { sum, magnitude } = gemmReference(a.values, b.values, m, n, k, transA, transB);
      const [alpha, beta] = [i % 3 ? 1 : -0.75, i % 2 ? 0.5 : 0];
      const runs: Float32Array[] = [];
      for (let round = 0; round < 2; round++) {
        const c = make([m, n], cType, 3 * i + 2, pad);
        if (beta === 0) fill(c.gpu, Number.NaN);
        gemm({ a: a.gpu, b: b.gpu, c: c.gpu, transA, transB, alpha, beta, backend: 1 });
        runs.push(await fetch(c.gpu));
        if (round) continue;
        close(
          `${aType} x ${bType} ${m}x${n}x${k} ${transA} ${transB} pad ${pad}`,
          runs[0] as Float32Array,
          sum.map((s, at) => alpha * s + beta * (c.values[at] as number)),
          cType,
          (at) => (magnitude[at] as number) + Math.abs(c.values[at] as number),
          k,
        );
      }
      assert(
        (runs[0] as Float32Array).every((v, at) => v === (runs[1] as Float32Array)[at]),
        `${m}x${n}x${k}: bits differ between two runs`,
      );
    }
  }
  // A row's bits do not depend on how many rows there are: a recomputed chunk must give the forward's.
  for (const [n, k, aType] of [
    [8, 2880, 'bf16'],
    [32, 520, 'bf16'],
    [1500, 61, 'f32'],
  ] as const) {
    const a = make([6200, k], aType, 1);
    const b = make([n, k], 'f32', 2);
    using all = empty([6200, n], { device: 'cuda' });
    using few = empty([77, n], { device: 'cuda' });
    gemm({ a: a.gpu, b: b.gpu, c: all, transB: true });
    gemm({ a: a.gpu.rows(1000, 77), b: b.gpu, c: few, transB: true });
    const [x, y] = [await all.rows(1000, 77).read(), await few.read()];
    assert(
      y.every((v, at) => v === x[at]),
      `${n} x ${k}: bits depend on the number of rows`,
    );
  }
});

gemmTest('gemm: several tiles a block, k from less than a step to more than a ring of stages', async () => {
  // 228 tiles of 256 x 128: more than an H100 has multiprocessors. The rows looked at lie in whole tiles, in the partial ones, and on both sides of the borders.
  const [m, n] = small ? [520, 264] : [4616, 1416];
  const rows = [0, 8, 63, 64, 127, 128, 255, 256, 511, 512, 519, 2047, 2048, 3333, 4607, 4608, 4615].filter((row) => row < m);
  for (const k of small ? [24, 328] : [8, 24, 72, 328, 1000])
    for (const ta of [false, true])
      for (const tb of small ? [!ta] : [false, true])
        for (const cType of small || k !== 328 ? (['bf16'] as const) : (['bf16', 'f32'] as const)) {
          const a = make(ta ? [k, m] : [m, k], 'bf16', k);
          const b = make(tb ? [n, k] : [k, n], 'bf16', k + 1);
          using c = empty([m, n], { dtype: cType, device: 'cuda' });
          fill(c, Number.NaN);
          gemm({ a: a.gpu, b: b.gpu, c, transA: ta, transB: tb, backend: 1 });
          for (const row of rows) {
            const one = Float32Array.from({ length: k }, (_, i) => a.values[ta ? i * m + row : row * k + i] as number);
            const { sum, magnitude } = gemmReference(one, b.values, 1, n, k, false, tb);
            close(`${cType} ${ta} ${tb} k ${k} row ${row}`, await fetch(c.rows(row, 1)), sum, cType, (i) => magnitude[i] as number, k);
          }
          if (k !== 328) continue;
          using again = empty([m, n], { dtype: cType, device: 'cuda' });
          gemm({ a: a.gpu, b: b.gpu, c: again, transA: ta, transB: tb, backend: 1 });
          const [first, second] = [await c.read(), await again.read()];
          assert(
            first.every((v, i) => v === second[i]),
            `${cType} ${ta} ${tb} k ${k}: not every element written, or not the same bits twice`,
          );
        }
});

gemmTest('grouped gemm weight gradient: experts of many rows, of none and of one', async () => {
  const offsets = small ? [0, 0, 1, 200, 264] : [0, 0, 1, 700, 700, 2500, 2564, 2565, 3300];
  const experts = offsets.length - 1;
  const [rows, m, n] = [offsets[experts] as number, small ? 136 : 520, small ? 264 : 1032];
  const a = make([rows, m], 'bf16', 1);
  const b = make([rows, n], 'bf16', 2);
  using at = empty([experts + 1], { dtype: 'i32', device: 'cuda' });
  using host = fromTypedArray(Int32Array.from(offsets), [experts + 1]);
  copy(at, host);
  for (const cType of ['bf16', 'f32'] as const) {
    using c = empty([experts, m, n], { dtype: cType, device: 'cuda' });
    fill(c, Number.NaN);
    groupedGemmWeightGrad({ a: a.gpu, b: b.gpu, c, offsets: at });
    for (let e = 0; e < experts; e++)
      for (const row of [0, 64, 135, 255, 256, m - 1].filter((r) => r < m)) {
        const [start, end] = [offsets[e] as number, offsets[e + 1] as number];
        const one = Float32Array.from({ length: end - start }, (_, i) => a.values[(start + i) * m + row] as number);
        const { sum, magnitude } = gemmReference(one, b.values.subarray(start * n, end * n), 1, n, end - start, false, false);
        const got = await fetch(c.rows(e, 1).view([m, n]).rows(row, 1));
        close(`${cType} expert ${e} row ${row}`, got, sum, cType, (i) => magnitude[i] as number, Math.max(1, end - start));
      }
  }
});

gemmTest('gemm: a long k in pieces, the same bits twice', async () => {
  for (const [m, n, k, aType, bType, cType] of [
    [8, 264, small ? 2051 : 5003, 'bf16', 'bf16', 'f32'],
    [264, 8, small ? 2048 : 4096, 'f32', 'bf16', 'f32'],
    [72, 200, small ? 2100 : 9000, 'bf16', 'bf16', 'bf16'],
    [5, 7, 2049, 'f32', 'f32', 'f32'],
  ] as const) {
    const a = make([k, m], aType, 1);
    const b = make([k, n], bType, 2);
    const { sum, magnitude } = gemmReference(a.values, b.values, m, n, k, true, false);
    const runs: Float32Array[] = [];
    for (let round = 0; round < 2; round++) {
      const c = make([m, n], cType, 3);
      gemm({ a: a.gpu, b: b.gpu, c: c.gpu, transA: true, alpha: 2, beta: 1, backend: 1 });
      runs.push(await fetch(c.gpu));
      const want = sum.map((s, i) => 2 * s + (c.values[i] as number));
      close(
        `${m}x${n}x${k}`,
        runs[round] as Float32Array,
        want,
        cType,
        (i) => 2 * (magnitude[i] as number) + Math.abs(c.values[i] as number),
        k,
      );
    }
    assert(
      (runs[0] as Float32Array).every((v, i) => v === (runs[1] as Float32Array)[i]),
      `${m}x${n}x${k}: bits differ between two runs`,
    );
  }
});

gemmTest('gemm: an element has the same bits wherever its row lies', async () => {
  const [m, n, k] = [1111, 392, small ? 136 : 1000];
  using a = make([m, k], 'bf16', 1).gpu;
  using b = make([2, n, k], 'bf16', 2).gpu;
  using all = empty([m, n], { device: 'cuda' });
  gemm({ a, b: b.rows(1, 1).view([n, k]), c: all, transB: true, backend: 1 });
  const want = await all.read();
  const same = async (what: string, c: Tensor, first: number): Promise<void> => {
    const got = await c.read();
    assert(
      got.every((v, i) => v === want[first * n + i]),
      `${what}: bits differ`,
    );
  };
  // Fewer rows make other tiles; so does an expert's share of them.
  for (const [first, rows] of [
    [0, 1],
    [5, 40],
    [100, 333],
    [300, 811],
  ] as const) {
    using c = empty([rows, n], { device: 'cuda' });
    gemm({ a: a.rows(first, rows), b: b.rows(1, 1).view([n, k]), c, transB: true, backend: 1 });
    await same(`${rows} rows`, c, first);
  }
  using offsets = empty([3], { dtype: 'i32', device: 'cuda' });
  for (const first of [0, 7, 600]) {
    using host = fromTypedArray(Int32Array.of(0, first, m), [3]);
    copy(offsets, host);
    using c = empty([m, n], { device: 'cuda' });
    groupedGemm({ a, b, c, offsets, transB: true });
    await same(`expert from row ${first}`, c.rows(first, m - first), first);
  }
});

gemmTest('grouped gemm: many rows per expert and a long k, x W', async () => {
  const [rows, k, n] = [2560, 4104, 136];
  const a = make([rows, k], 'bf16', 1);
  const b = make([2, k, n], 'bf16', 2);
  using offsets = empty([3], { dtype: 'i32', device: 'cuda' });
  using host = fromTypedArray(Int32Array.of(0, 1100, rows), [3]);
  copy(offsets, host);
  using c = empty([rows, n], { device: 'cuda' });
  fill(c, Number.NaN);
  groupedGemm({ a: a.gpu, b: b.gpu, c, offsets });
  for (const row of [0, 255, 256, 1099, 1100, 1355, 1356, 2559]) {
    const e = row < 1100 ? 0 : 1;
    const { sum, magnitude } = gemmReference(
      a.values.subarray(row * k, (row + 1) * k),
      b.values.subarray(e * k * n, (e + 1) * k * n),
      1,
      n,
      k,
      false,
      false,
    );
    close(`row ${row}`, await fetch(c.rows(row, 1)), sum, 'f32', (i) => magnitude[i] as number, k);
  }
  // Each row has the bits that a plain product gives it.
  using plain = empty([rows - 1100, n], { device: 'cuda' });
  gemm({ a: a.gpu.rows(1100, rows - 1100), b: b.gpu.rows(1, 1).view([k, n]), c: plain, backend: 1 });
  const [want, got] = [await plain.read(), await c.rows(1100, rows - 1100).read()];
  assert(
    got.every((v, i) => v === want[i]),
    'bits differ from those of a plain product',
  );
});

gemmTest('grouped gemm: large tiles; offsets that lie do not lead outside', async () => {
  const offsets = [0, 700, 700, 1957, 4000, 4096, 5000, 5500, 6400];
  const experts = offsets.length - 1;
  const [rows, k, n] = [6400, 136, 1032];
  const a = make([rows, k], 'bf16', 1);
  using at = empty([experts + 1], { dtype: 'i32', device: 'cuda' });
  const b = make([experts, n, k], 'bf16', 2);
  using c = empty([rows, n], { dtype: 'bf16', device: 'cuda' });
  using honest = fromTypedArray(Int32Array.from(offsets), [experts + 1]);
  copy(at, honest);
  fill(c, Number.NaN);
  groupedGemm({ a: a.gpu, b: b.gpu, c, offsets: at, transB: true });
  for (const row of [0, 255, 256, 699, 700, 1956, 1957, 3999, 4000, 4095, 4096, 5499, 6399]) {
    const e = offsets.findLastIndex((o, i) => i < experts && o <= row && (offsets[i + 1] as number) > row);
    const { sum, magnitude } = gemmReference(
      a.values.subarray(row * k, (row + 1) * k),
      b.values.subarray(e * n * k, (e + 1) * n * k),
      1,
      n,
      k,
      false,
      true,
    );
    close(`row ${row}`, await fetch(c.rows(row, 1)), sum, 'bf16', (i) => magnitude[i] as number, k);
  }
  assert(
    (await fetch(c)).every((v) => !Number.isNaN(v)),
    'rows were left out',
  );
  using lying = fromTypedArray(Int32Array.from([-5, 2 ** 31 - 1, 3, -(2 ** 31), 9e6, 100, 7000, 6400, 6401]), [experts + 1]);
  copy(at, lying);
  groupedGemm({ a: a.gpu, b: b.gpu, c, offsets: at, transB: true });
  using dw = empty([experts, k, n], { device: 'cuda' });
  groupedGemmWeightGrad({ a: a.gpu, b: c, c: dw, offsets: at });
  await defaultStream('cuda').sync();
});

largeTest('rows beyond 2^31 elements', async () => {
  const [rows, width, n] = [760_000, 2880, 64]; // 2^31 / 2,880 = 745,654 rows
  using x = empty([rows, width], { dtype: 'bf16', device: 'cuda' });
  const block = make([1 << 12, width], 'bf16', 1);
  for (let r = 0; r < rows; r += 1 << 12) copy(x.rows(r, Math.min(1 << 12, rows - r)), block.gpu.rows(0, Math.min(1 << 12, rows - r)));
  const w = make([n, width], 'bf16', 2);
  using c = empty([rows, n], { dtype: 'f32', device: 'cuda' });
  gemm({ a: x, b: w.gpu, c, transB: true, backend: 1 });
  const weight = make([width], 'bf16', 3);
  using y = empty([rows, width], { dtype: 'bf16', device: 'cuda' });
  rmsNorm({ x, weight: weight.gpu, out: y, eps: 1e-5 });
  add({ a: y, b: x, out: x });
  using ids = empty([2], { dtype: 'i32', device: 'cuda' });
  using idHost = fromTypedArray(Int32Array.from([rows - 1, 745_655]), [2]);
  copy(ids, idHost);
  using picked = empty([2, width], { dtype: 'bf16', device: 'cuda' });
  embeddingGather({ table: y, ids, out: picked });
  for (const [i, row] of [rows - 1, 745_655].entries()) {
    const values = block.values.subarray((row % 4096) * width, ((row % 4096) + 1) * width);
    const { sum, magnitude } = gemmReference(values, w.values, 1, n, width, false, true);
    close(`gemm row ${row}`, await fetch(c.rows(row, 1)), sum, 'f32', (j) => magnitude[j] as number, width);
    const inverse = 1 / Math.sqrt(values.reduce((s, v) => s + v * v, 0) / width + 1e-5);
    const normed = Float64Array.from(values, (v, j) => v * inverse * (weight.values[j] as number));
    close(`rmsNorm row ${row}`, await fetch(y.rows(row, 1)), normed, 'bf16', (j) => Math.abs(normed[j] as number), width);
    close(`gather row ${row}`, await fetch(picked.rows(i, 1)), normed, 'bf16', (j) => Math.abs(normed[j] as number), width);
    const got = await fetch(y.rows(row, 1));
    close(
      `add row ${row}`,
      await fetch(x.rows(row, 1)),
      values.map((v, j) => v + (got[j] as number)),
      'bf16',
      (j) => Math.abs(got[j] as number) + 5,
      2,
    );
  }
});

test('row ops: norms of heads, wide rows, many rows; the same bits twice', async () => {
  for (const [tokens, heads, width] of [
    [300, 5, 64],
    [77, 3, 128],
    [small ? 70 : 700, 1, 2880],
    [40, 1, 8192],
    [20, 1, 8200],
    [5, 3, 1032],
  ] as const) {
    const x = make([tokens, heads, width], 'bf16', 1);
    const dout = make([tokens, heads, width], 'bf16', 2);
    const w = make([width], 'f32', 3);
    using out = empty([tokens, heads, width], { dtype: 'bf16', device: 'cuda' });
    const items = tokens * heads;
    const inverse = Float64Array.from({ length: items }, (_, r) => {
      return 1 / Math.sqrt(x.values.subarray(r * width, (r + 1) * width).reduce((s, v) => s + v * v, 0) / width + 1e-6);
    });
    rmsNorm({ x: x.gpu, weight: w.gpu, out, eps: 1e-6 });
    const want = Float64Array.from(x.values, (v, i) => v * (inverse[Math.floor(i / width)] as number) * (w.values[i % width] as number));
    close(`forward ${heads}x${width}`, await fetch(out), want, 'bf16', (i) => Math.abs(want[i] as number), width);
    const dw = new Float64Array(width);
    const magnitude = new Float64Array(width);
    for (let i = 0; i < items * width; i++) {
      const term = (x.values[i] as number) * (dout.values[i] as number) * (inverse[Math.floor(i / width)] as number);
      dw[i % width] = (dw[i % width] as number) + term;
      magnitude[i % width] = (magnitude[i % width] as number) + Math.abs(term);
    }
    const runs: Float32Array[] = [];
    for (let round = 0; round < 2; round++) {
      using dWeight = zeros([width], { device: 'cuda' });
      copy(out, dout.gpu);
      rmsNormBackward({ x: x.gpu, weight: w.gpu, dout: dout.gpu, dx: out, eps: 1e-6, dWeight, accumulate: true });
      runs.push(await fetch(dWeight), await fetch(out));
    }
    close(`dWeight ${heads}x${width}`, runs[0] as Float32Array, dw, 'f32', (i) => magnitude[i] as number, items + width);
    const projections = Float64Array.from({ length: items }, (_, r) => {
      let projection = 0;
      for (let j = r * width; j < (r + 1) * width; j++)
        projection += (x.values[j] as number) * (dout.values[j] as number) * (w.values[j % width] as number);
      return projection;
    });
    const dx = Float64Array.from(x.values, (v, i) => {
      const r = Math.floor(i / width);
      const s = inverse[r] as number;
      const d = dout.values[i] as number;
      return d + s * (d * (w.values[i % width] as number) - (v * s * s * (projections[r] as number)) / width);
    });
    close(
      `dx ${heads}x${width}`,
      runs[1] as Float32Array,
      dx,
      'bf16',
      (i) => 4 * Math.abs(dout.values[i] as number) + 4 * Math.abs(x.values[i] as number) + 1,
      width,
    );
    for (const [first, second] of [
      [0, 2],
      [1, 3],
    ] as const) {
      assert(
        (runs[first] as Float32Array).every((v, i) => Object.is(v, (runs[second] as Float32Array)[i])),
        `${heads}x${width}: bits differ between two runs`,
      );
    }
  }
  const [rows, width] = [small ? 700 : 5000, 72];
  const x = make([rows, width], 'bf16', 4);
  using sums = zeros([width], { device: 'cuda' });
  sumRows({ x: x.gpu, out: sums, accumulate: true });
  const sum = new Float64Array(width);
  const size = new Float64Array(width);
  x.values.forEach((v, i) => {
    sum[i % width] = (sum[i % width] as number) + v;
    size[i % width] = (size[i % width] as number) + Math.abs(v);
  });
  close('sumRows 5000', await fetch(sums), sum, 'f32', (i) => size[i] as number, rows);
  const vocab = 50;
  const idValues = Int32Array.from({ length: rows }, (_, i) => (i % 3 ? i % 7 : (i * i) % vocab));
  using ids = empty([rows], { dtype: 'i32', device: 'cuda' });
  using idHost = fromTypedArray(idValues, [rows]);
  copy(ids, idHost);
  using dTable = zeros([vocab, width], { device: 'cuda' });
  embeddingScatterAdd({ dout: x.gpu, ids, dTable });
  const scattered = new Float64Array(vocab * width);
  const weight = new Float64Array(vocab * width);
  x.values.forEach((v, i) => {
    const to = (idValues[Math.floor(i / width)] as number) * width + (i % width);
    scattered[to] = (scattered[to] as number) + v;
    weight[to] = (weight[to] as number) + Math.abs(v);
  });
  close('scatter 5000', await fetch(dTable), scattered, 'f32', (i) => weight[i] as number, rows);
});
