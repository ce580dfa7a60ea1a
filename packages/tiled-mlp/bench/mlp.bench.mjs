// Tiled against untiled, time and peak memory, forward and backward on the CPU.
// Once built: node bench/mlp.bench.mjs
import { fromTypedArray, numThreads, PlainExpertLinear, PlainLinear, Workspace } from '@lc/tensor';
import { TiledMLP, TiledMoE } from '../dist/index.js';

const random = (...shape) => {
  const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
  let state = 12345;
  for (let i = 0; i < values.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    values[i] = (state / 2 ** 32 - 0.5) / 8;
  }
  return fromTypedArray(values, shape);
};

function measure(name, make, tokens, hidden, flopsPerToken) {
  const [x, out, dout] = [random(tokens, hidden), random(tokens, hidden), random(tokens, hidden)];
  const at = { start: 0, length: tokens, docStart: null };
  for (const tile of [tokens, 1024, 256]) {
    const block = make(tile);
    const ws = new Workspace();
    const times = [];
    for (let i = 0; i < 4; i++) {
      const start = performance.now();
      block.forward(x, out, at, ws);
      block.backward(x, dout, out, at, ws);
      times.push(performance.now() - start);
    }
    const seconds = Math.min(...times.slice(1)) / 1e3;
    const label = tile === tokens ? 'untiled' : `tile ${tile}`;
    console.log(
      `${name.padEnd(34)} ${label.padEnd(10)} ${(seconds * 1e3).toFixed(0).padStart(6)} ms  ${((flopsPerToken * tokens) / seconds / 1e9).toFixed(0).padStart(5)} GFLOP/s  workspace ${(ws.peakBytes / 2 ** 20).toFixed(1)} MiB`,
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
