/** What `./run parity` is made of, on the CPU: a run of a reference model, runs with another run's routing, and the comparison with a peer. */
import { expectNoLeaks } from '@lc/tensor/testing';
import { expect, it } from 'vitest';
import { readReference } from '../parity/reference.js';
import { compare } from './parity-peer.js';
import { gradientRatios, ratios, type Sample, samplesOf } from './parity-pool.js';
import { conditionOf, type RunErrors, runReference } from './parity-run.js';
import { flipped } from './routing.js';

expectNoLeaks();

it.each(['qwen3-moe', 'gpt-oss-expert-lora'])('%s: a run told the experts that it chose anyway gives the same numbers', async (name) => {
  const reference = await readReference(name);
  const run = await runReference(reference, 'cpu');
  expect(run.sameBits).toBe(true);
  for (const error of [run.baseLoss, run.adapterLoss, ...Object.values(run.gradients), ...run.losses]) expect(error).toBeLessThan(1e-4);
  const again = await runReference(reference, 'cpu', run.tiles);
  expect(flipped(again.tiles, run.tiles).flipped).toBe(0);
  for (const [key, error] of Object.entries(again.gradients)) expect(Math.abs(error - (run.gradients[key] as number))).toBeLessThan(1e-5);

  // And sent elsewhere, it goes there: token 3's last expert becomes another in the first tile.
  const [first, ...rest] = run.tiles as [(typeof run.tiles)[0], ...typeof run.tiles];
  const ids = first.ids.slice();
  const mine = ids.slice(3 * first.topK, 4 * first.topK);
  ids[4 * first.topK - 1] = [0, 1, 2, 3].find((e) => !mine.includes(e)) as number;
  const moved = await runReference(reference, 'cpu', [{ ...first, ids }, ...rest]);
  expect(flipped(moved.tiles, run.tiles)).toEqual({ flipped: 1, routed: expect.any(Number) });
  expect(Math.max(...Object.values(moved.gradients))).toBeGreaterThan(1e-4);
});

it('measures how much a model magnifies noise', async () => {
  const [calm, wild] = [await conditionOf(await readReference('qwen3-rslora')), await conditionOf(await readReference('gpt-oss'))];
  expect(calm).toBeGreaterThan(2);
  expect(calm).toBeLessThan(8);
  expect(wild).toBeGreaterThan(3 * calm);
});

it('passes what is within twice the peer, gradient by gradient and in median and worst loss', () => {
  const errors = (gradients: number[], losses: number[]): RunErrors => ({
    baseLoss: 0,
    adapterLoss: 0,
    gradients: Object.fromEntries(gradients.map((g, i) => [`p${i}`, g])),
    losses,
  });
  const theirs = errors([0.1, 0.2, 0.3], [0.01, 0.02, 0.03]);
  expect(compare(errors([0.2, 0.4, 0.6], [0.03, 0.01, 0.06]), theirs)).toMatchObject({ gradientsBeyond: 0, lossesBeyond: 1, pass: true });
  expect(compare(errors([0.21, 0.2, 0.3], [0.01, 0.02, 0.03]), theirs)).toMatchObject({ gradientsBeyond: 1, pass: false });
  expect(compare(errors([0.1, 0.2, 0.3], [0.01, 0.02, 0.07]), theirs).pass).toBe(false);
  expect(compare(errors([0.1, 0.2, Number.NaN], [0.01, 0.02, 0.03]), theirs).pass).toBe(false);
  expect(() => compare(errors([0.1, 0.2], [0.01]), theirs)).toThrow('other parameters');
});

it('pools inputs: each step by its root mean square over them', () => {
  const errors = (gradient: number, losses: number[]): RunErrors => ({ baseLoss: 0, adapterLoss: 0, gradients: { p: gradient }, losses });
  const peer = (s: number, losses: number[]) => ({
    autocast: { ...errors(0.1 * s, losses), attention: 'sdpa' },
    plain: {
      ...errors(
        0.1,
        losses.map((v) => 3 * v),
      ),
      attention: 'sdpa',
    },
  });
  const inputs = [
    [3e-4, 4e-4],
    [4e-4, 3e-4],
  ] as const;
  const pooled = samplesOf(
    Object.fromEntries(inputs.map(([a, b], k) => [`llama.s${k + 1}`, { bf16: errors(0.15, [2 * a, b / 2]), forced: null }])),
    {
      ...{ device: '', torch: '', transformers: '', peft: '' },
      models: Object.fromEntries(inputs.map((losses, k) => [`llama.s${k + 1}`, peer(k + 1, [...losses])])),
    },
  );
  expect([...pooled.keys()]).toEqual(['llama']);
  const samples = pooled.get('llama') as Sample[];
  expect(gradientRatios(samples).single).toBeCloseTo(1.5, 10);
  const mine = ratios(
    samples.map((s) => s.ours),
    samples.map((s) => s.theirs),
  );
  expect(mine.steps).toEqual([expect.closeTo(2, 10), expect.closeTo(0.5, 10)]);
  expect(mine.rms).toBeCloseTo(Math.sqrt((4 + 0.25) / 2), 10);
  const its = ratios(
    samples.map((s) => s.other as RunErrors),
    samples.map((s) => s.theirs),
  );
  expect([its.beyond, its.rms]).toEqual([4, expect.closeTo(3, 10)]);
});
