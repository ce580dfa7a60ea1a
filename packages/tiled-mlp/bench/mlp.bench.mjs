// Tiled against untiled, time and peak memory, forward and backward on the CPU.
// Once built: node bench/mlp.bench.mjs
import { fromTypedArray, numThreads, PlainExpertLinear, PlainLinear, Scope, Workspace } from '@lc/tensor';
import { TiledMLP, TiledMoE } from '../dist/index.js';

const weights = new Scope();
const random = (...shape) => {
  const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
  let state = 12345;
  for (let i = 0; i < values.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    values[i] = (state / 2 ** 32 - 0.5) / 8;
  }
  return weights.own(fromTypedArray(values, shape));
};

/** The variants take turns, so that a busy moment of the machine hits all of them; the best of ten counts. */
function measure(name, make, tokens, hidden, flopsPerToken) {
  const [x, out, dout] = [random(tokens, hidden), random(tokens, hidden), random(tokens, hidden)];
  const at = { start: 0, length: tokens, docStart: null };
  const variants = [tokens, 1024, 256].map((tile) => ({ tile, block: make(tile), ws: new Workspace(), best: Number.POSITIVE_INFINITY }));
  for (let i = 0; i < 10; i++) {
    for (const v of variants) {
      const start = performance.now();
      v.block.forward(x, out, at, v.ws);
      v.block.backward(x, dout, out, at, v.ws);
      v.best = Math.min(v.best, performance.now() - start);
    }
  }
  for (const { tile, ws, best } of variants) {
    const label = tile === tokens ? 'untiled' : `tile ${tile}`;
    const rate = (flopsPerToken * tokens) / best / 1e6;
    console.log(
      `${name.padEnd(28)} ${label.padEnd(10)} ${best.toFixed(0).padStart(5)} ms ${rate.toFixed(0).padStart(5)} GFLOP/s  workspace ${(ws.peakBytes / 2 ** 20).toFixed(1)} MiB`,
    );
    ws.dispose();
  }
}

const tokens = 4096;
console.log(`${tokens} tokens, f32, ${numThreads()} threads`);
{
  const [hidden, inter] = [512, 1408];
  const [gateProj, upProj, downProj] = [random(inter, hidden), random(inter, hidden), random(hidden, inter)].map(
    (weight) => new PlainLinear({ weight }),
  );
  const norm = { weight: random(hidden), eps: 1e-5 };
  // forward 3 GEMMs; backward 2 recomputed and 3 for the input gradient (frozen weights)
  measure(
    `dense ${hidden} x ${inter}`,
    (tile) => new TiledMLP({ gateProj, upProj, downProj, activation: 'silu', tile, norm }),
    tokens,
    hidden,
    8 * 2 * hidden * inter,
  );
}
{
  const [hidden, inter, experts, topK] = [384, 384, 16, 4];
  const gateUp = new PlainExpertLinear({ weight: random(experts, 2 * inter, hidden) });
  const down = new PlainExpertLinear({ weight: random(experts, hidden, inter) });
  const options = {
    kind: 'gpt-oss',
    router: { weight: random(experts, hidden) },
    gateUp,
    down,
    topK,
    norm: { weight: random(hidden), eps: 1e-5 },
  };
  measure(
    `gpt-oss ${hidden} x ${inter}, ${topK} of ${experts}`,
    (tile) => new TiledMoE({ ...options, tile }),
    tokens,
    hidden,
    8 * 2 * hidden * inter * topK,
  );
}
weights.dispose();
