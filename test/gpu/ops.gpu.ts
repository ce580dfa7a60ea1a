/** The optimization packages on a GPU, held against themselves on the CPU in f32 (which tests hold against f64), on inputs that bf16 holds exactly. */
import { type CrossEntropyOptions, chunkedCrossEntropy } from '@lc/chunked-ce';
import { AdamW, LoraExpertLinear, LoraLinear, Mxfp4Weight, Nf4Weight, QuantizedExpertLinear, QuantizedLinear } from '@lc/qlora';
import {
  copy,
  type DType,
  type ExpertLinear,
  empty,
  fromTypedArray,
  type Parameter,
  PlainExpertLinear,
  PlainLinear,
  Scope,
  type Span,
  type Tensor,
  Workspace,
  zeros,
} from '@lc/tensor';
import { TiledMLP, TiledMoE } from '@lc/tiled-mlp';
import { randomNormal as random } from '../../packages/tensor/src/seeded.js';
import { assert, small, test } from './harness.js';
import { difference, values } from './numbers.js';

const count = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);
type Where = 'cpu' | 'cuda';

/** Values that bf16 holds, as f32 on the CPU or bf16 on the GPU (or f32 there). */
function tensor(scope: Scope, where: Where, shape: number[], seed: number, scale = 1, gpuDtype: DType = 'bf16'): Tensor {
  using source = fromTypedArray(
    random(count(shape), seed).map((v) => v * scale),
    shape,
  );
  using low = empty(shape, { dtype: 'bf16' });
  copy(low, source);
  const out = scope.own(empty(shape, where === 'cpu' ? {} : { dtype: gpuDtype, device: 'cuda' }));
  copy(out, low);
  return out;
}
/** One bf16 rounding is a relative 2^-9 at most, 0.0011 on average; chains of `roundings` of them add up like a random walk, twice allowed. */
function near(what: string, got: Float32Array, want: Float32Array, roundings: number): void {
  const d = difference(got, want);
  const allowed = 2 * 0.0017 * Math.sqrt(roundings);
  assert(d <= allowed, `${what}: relative error ${d.toExponential(2)}, allowed ${allowed.toExponential(2)}`);
}

/** Runs the same code on both devices. */
async function both<T>(fn: (where: Where, scope: Scope, ws: Workspace) => Promise<T>): Promise<{ cpu: T; cuda: T }> {
  const run = async (where: Where): Promise<T> => {
    using scope = new Scope();
    using ws = new Workspace({ device: where });
    return await fn(where, scope, ws);
  };
  return { cpu: await run('cpu'), cuda: await run('cuda') };
}

test("NF4 and MXFP4 dequantization: the CPU's bits", async () => {
  for (const shape of [
    [3, 64],
    [7, 96],
    [64, 2880],
    [33, 5, 32],
    [1029, 32],
  ]) {
    using source = fromTypedArray(random(count(shape), 3), shape);
    for (const dtype of ['bf16', 'f32'] as const) {
      for (const doubleQuant of [true, false]) {
        using cpu = Nf4Weight.quantize(source, { doubleQuant });
        using want = empty(shape, { dtype });
        cpu.dequantize(want);
        using again = Nf4Weight.quantize(source, { doubleQuant });
        using gpu = again.to('cuda');
        using got = empty(shape, { dtype, device: 'cuda' });
        gpu.dequantize(got);
        const [g, w] = [await values(got), await values(want)];
        assert(
          g.every((v, i) => v === w[i]),
          `nf4 ${shape} ${dtype} ${doubleQuant}`,
        );
      }
      using cpu = Mxfp4Weight.quantize(source);
      using want = empty(shape, { dtype });
      cpu.dequantize(want);
      using blocks = empty(cpu.blocks.shape, { dtype: 'u8', device: 'cuda' });
      using scales = empty(cpu.scales.shape, { dtype: 'u8', device: 'cuda' });
      copy(blocks, cpu.blocks);
      copy(scales, cpu.scales);
      using got = empty(shape, { dtype, device: 'cuda' });
      new Mxfp4Weight({ blocks, scales }).dequantize(got);
      const [g, w] = [await values(got), await values(want)];
      assert(
        g.every((v, i) => Object.is(v, w[i])),
        `mxfp4 ${shape} ${dtype}`,
      );
    }
  }
});

const at: Span = { start: 100, length: 37, docStart: null, dropoutSeed: 12345678901 };

test('LoRA over NF4, with dropout: forward, backward, gradients', async () => {
  const { cpu, cuda } = await both(async (where, scope, ws) => {
    const [n, inner, outer] = [37, 96, 160];
    using full = fromTypedArray(
      random(outer * inner, 1).map((v) => v / 10),
      [outer, inner],
    );
    const quantized = Nf4Weight.quantize(full);
    const weight = scope.own(where === 'cuda' ? quantized.to('cuda') : quantized);
    const bias = tensor(scope, where, [outer], 2);
    const lora = scope.own(
      new LoraLinear({ base: new QuantizedLinear({ weight, bias }), r: 4, loraAlpha: 8, loraDropout: 0.25, name: 'probe', device: where }),
    );
    copy(lora.b.value, tensor(scope, where, [outer, 4], 3, 0.1, 'f32'));
    const x = tensor(scope, where, [n, inner], 4);
    const dout = tensor(scope, where, [n, outer], 5);
    const out = ws.alloc([n, outer]);
    const dx = ws.alloc([n, inner]);
    lora.open('backward', ws);
    lora.forward(x, out, at, ws);
    lora.backward(x, dout, dx, at, ws);
    lora.close();
    return { out: await values(out), dx: await values(dx), da: await values(lora.a.grad), db: await values(lora.b.grad) };
  });
  near('out', cuda.out, cpu.out, 2);
  near('dx', cuda.dx, cpu.dx, 3);
  near('dA', cuda.da, cpu.da, 2);
  near('dB', cuda.db, cpu.db, 2);
});

test('LoRA on fused experts', async () => {
  const { cpu, cuda } = await both(async (where, scope, ws) => {
    const [rows, experts, inner, outer] = [50, 3, 64, 96];
    const base = new PlainExpertLinear({ weight: tensor(scope, where, [experts, outer, inner], 1, 0.1) });
    const lora = scope.own(new LoraExpertLinear({ base, r: 4, name: 'experts', device: where }));
    copy(lora.b.value, tensor(scope, where, [outer, 4 * experts], 3, 0.1, 'f32'));
    using host = fromTypedArray(Int32Array.of(0, 20, 20, 50), [4]);
    const offsets = scope.own(empty([4], { dtype: 'i32', device: where }));
    copy(offsets, host);
    const [x, dout] = [tensor(scope, where, [rows, inner], 4), tensor(scope, where, [rows, outer], 5)];
    const [out, dx] = [ws.alloc([rows, outer]), ws.alloc([rows, inner])];
    lora.forward(x, out, offsets, ws);
    lora.backward(x, dout, dx, offsets, ws);
    return { out: await values(out), dx: await values(dx), da: await values(lora.a.grad), db: await values(lora.b.grad) };
  });
  near('out', cuda.out, cpu.out, 2);
  near('dx', cuda.dx, cpu.dx, 3);
  near('dA', cuda.da, cpu.da, 2);
  near('dB', cuda.db, cpu.db, 2);
});

for (const optimBits of [32, 8] as const) {
  test(`AdamW, ${optimBits} bits, with clipping`, async () => {
    const { cpu, cuda } = await both(async (where, scope) => {
      const parameters: Parameter[] = [[5000], [70, 90], [3]].map((shape, i) => ({
        name: `p${i}`,
        value: tensor(scope, where, shape, i, 1, 'f32'),
        grad: scope.own(zeros(shape, { device: where })),
      }));
      const optimizer = scope.own(new AdamW(parameters, { lr: 1e-2, optimBits }));
      const norms: number[] = [];
      for (let step = 0; step < 5; step++) {
        for (const [i, p] of parameters.entries()) copy(p.grad, tensor(scope, where, [...p.grad.shape], 10 * step + i, 0.5, 'f32'));
        norms.push(optimizer.step({ maxGradNorm: 1 }).gradNorm);
      }
      const out: Float32Array[] = [];
      for (const p of parameters) out.push(await values(p.value));
      return { norms, out };
    });
    cuda.norms.forEach((n, i) => assert(Math.abs(n - (cpu.norms[i] as number)) <= 1e-12 * n, `norm ${n}, expected ${cpu.norms[i]}`));
    // 8 bits: a code on a rounding tie may fall either way, which moves single elements.
    cuda.out.forEach((v, i) =>
      assert(
        difference(v, cpu.out[i] as Float32Array) < (optimBits === 32 ? 1e-6 : 1e-4),
        `parameter ${i}: ${difference(v, cpu.out[i] as Float32Array)}`,
      ),
    );
  });
}

test('chunked cross-entropy: every option', async () => {
  const options: (CrossEntropyOptions & { weighted?: boolean })[] = [
    {},
    { labelSmoothing: 0.1, zLoss: 1e-3 },
    { softCap: 5, logitScale: 0.5 },
    { weighted: true },
  ];
  for (const [i, { weighted, ...o }] of options.entries()) {
    const shapes = [
      [1, 32, 50],
      [131, 64, 1000],
      [37, 40, 33],
      [7, 24, 1001],
      // A row in the shared memory of two and of eight blocks, and one that does not fit there.
      [7, 8, 40_000],
      [3, 8, 201_088],
      [2, 8, 262_144],
      [2, 8, 201_091],
    ] as const;
    for (const [n, width, vocab] of small ? shapes.filter((_, at) => at % options.length === i) : shapes) {
      for (const chunk of [5, n]) {
        const { cpu, cuda } = await both(async (where, scope, ws) => {
          const hidden = tensor(scope, where, [n, width], 1);
          const weight = tensor(scope, where, [vocab, width], 2, 0.2);
          const labels = scope.own(
            fromTypedArray(
              Int32Array.from({ length: n }, (_, i) => (i % 3 === 1 && n > 1 ? -100 : (i * 7) % vocab)),
              [n],
            ),
          );
          const tokenWeights = weighted
            ? scope.own(
                fromTypedArray(
                  Float32Array.from({ length: n }, (_, i) => (i % 5) / 2),
                  [n],
                ),
              )
            : null;
          const dWeight = scope.own(zeros([vocab, width], { device: where }));
          const lossPerToken = scope.own(zeros([n], { device: where }));
          const { loss } = chunkedCrossEntropy({
            ...o,
            hidden,
            weight,
            labels,
            tokenWeights,
            chunk,
            dHidden: hidden,
            dWeight,
            lossPerToken,
            ws,
          });
          return { loss, dHidden: await values(hidden), dWeight: await values(dWeight), perToken: await values(lossPerToken) };
        });
        const name = `${JSON.stringify(o)} ${n}x${width}x${vocab} chunk ${chunk}`;
        assert(
          Math.abs(cuda.loss - cpu.loss) <= 2e-5 * Math.max(1, Math.abs(cpu.loss)),
          `${name}: loss ${cuda.loss}, expected ${cpu.loss}`,
        );
        near(`${name} dHidden`, cuda.dHidden, cpu.dHidden, 2);
        near(`${name} dWeight`, cuda.dWeight, cpu.dWeight, 1);
        assert(difference(cuda.perToken, cpu.perToken) < 2e-5, `${name}: per token ${difference(cuda.perToken, cpu.perToken)}`);
      }
    }
  }
});

for (const activation of ['silu', 'gelu', 'gelu_pytorch_tanh'] as const) {
  test(`dense MLP, ${activation}`, async () => {
    const { cpu, cuda } = await both(async (where, scope, ws) => {
      const [n, hidden, inner] = [37, 64, 96];
      const linear = (o: number, i: number, seed: number): PlainLinear =>
        new PlainLinear({ weight: tensor(scope, where, [o, i], seed, 0.2) });
      const mlp = new TiledMLP({
        gateProj: linear(inner, hidden, 1),
        upProj: linear(inner, hidden, 2),
        downProj: linear(hidden, inner, 3),
        activation,
        tile: 16,
        norm: { weight: tensor(scope, where, [hidden], 4), eps: 1e-5 },
      });
      const [x, dout] = [tensor(scope, where, [n, hidden], 5), tensor(scope, where, [n, hidden], 6)];
      const [out, dx] = [ws.alloc([n, hidden]), ws.alloc([n, hidden])];
      mlp.forward(x, out, at, ws);
      mlp.backward(x, dout, dx, at, ws);
      return { out: await values(out), dx: await values(dx) };
    });
    near('out', cuda.out, cpu.out, 5);
    near('dx', cuda.dx, cpu.dx, 8);
  });
}

for (const kind of ['gpt-oss', 'qwen3-moe'] as const) {
  for (const normTopkProb of kind === 'gpt-oss' ? [true] : [true, false]) {
    // Widths with and without vectors of eight; experts in one and in several rounds of a warp.
    for (const [hidden, inner, experts, topK] of [
      [64, 96, 8, 3],
      [60, 92, 8, 4],
      [72, 104, 40, 8],
      [61, 91, 130, 2],
    ] as const)
      test(`mixture of experts, ${kind}${normTopkProb ? '' : ', not normalised'}, ${topK} of ${experts}, ${hidden} x ${inner}`, async () => {
        const { cpu, cuda } = await both(async (where, scope, ws) => {
          const n = 131;
          const expert = (o: number, i: number, seed: number): ExpertLinear => {
            // (Small enough that no gate comes near its clamp, where one rounding decides whether a gradient passes.)
            if (i % 32) return new PlainExpertLinear({ weight: tensor(scope, where, [experts, o, i], seed, 0.1) });
            using full = fromTypedArray(
              random(experts * o * i, seed).map((v) => v / 5),
              [experts, o, i],
            );
            const q = Nf4Weight.quantize(full);
            return new QuantizedExpertLinear({ weight: scope.own(where === 'cuda' ? q.to('cuda') : q) });
          };
          const gpt = kind === 'gpt-oss';
          const moe = new TiledMoE({
            kind,
            router: {
              weight: tensor(scope, where, [experts, hidden], 1, 0.3, 'f32'),
              bias: gpt ? tensor(scope, where, [experts], 2, 1, 'f32') : null,
            },
            gateUp: expert(2 * inner, hidden, 3),
            gateUpBias: gpt ? tensor(scope, where, [experts, 2 * inner], 4) : null,
            down: expert(hidden, inner, 5),
            downBias: gpt ? tensor(scope, where, [experts, hidden], 6) : null,
            topK,
            normTopkProb,
            tile: 50,
            residual: true,
          });
          const [x, dout] = [tensor(scope, where, [n, hidden], 7), tensor(scope, where, [n, hidden], 8)];
          const [out, dx] = [ws.alloc([n, hidden]), ws.alloc([n, hidden])];
          const run = async (): Promise<{ out: Float32Array; dx: Float32Array }> => {
            moe.forward(x, out, { ...at, length: n }, ws);
            moe.backward(x, dout, dx, { ...at, length: n }, ws);
            return { out: await values(out), dx: await values(dx) };
          };
          const first = await run();
          const second = await run();
          assert(
            first.out.every((v, i) => v === second.out[i]) && first.dx.every((v, i) => v === second.dx[i]),
            `${where}: bits differ between two runs`,
          );
          return first;
        });
        near('out', cuda.out, cpu.out, 6);
        near('dx', cuda.dx, cpu.dx, 10);
      });
  }
}
