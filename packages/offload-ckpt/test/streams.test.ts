/** The store's waits, held against streams that run late and in every order the waits allow. */
import { fromTypedArray, type Span, Workspace } from '@lc/tensor';
import { expectNoLeaks, randomNormal, seededRandom } from '@lc/tensor/testing';
import { describe, expect, test } from 'vitest';
import { ActivationStore, LayerSchedule, type StoreShape } from '../src/index.js';
import { FakeMachine, type FakeStream } from './fake-stream.js';
import { ToyLayer } from './toy.js';

expectNoLeaks();

const WIDTH = 3;
type Pick = (streams: readonly FakeStream[]) => FakeStream[];

const byName =
  (...names: string[]): Pick =>
  (streams) =>
    names.map((name) => streams.find((s) => s.name === name)).filter((s) => s !== undefined);
const shuffled = (seed: number): Pick => {
  const random = seededRandom(seed);
  return (streams) =>
    streams
      .map((s) => [random(), s] as const)
      .sort((a, b) => a[0] - b[0])
      .map(([, s]) => s);
};
/** Copies as late as possible, as early as possible, one direction starved, and at random. */
const policies: Pick[] = [
  byName('compute', 'in', 'out'),
  byName('compute', 'out', 'in'),
  byName('in', 'out', 'compute'),
  byName('out', 'in', 'compute'),
  byName('in', 'compute', 'out'),
  byName('out', 'compute', 'in'),
  ...Array.from({ length: 8 }, (_, i) => shuffled(i + 1)),
];

interface Case extends Omit<StoreShape, 'width'> {
  /** Default: the schedule's own. */
  ahead?: number;
}

/** Queues two whole steps and an evaluation on fake streams (nothing has run yet), then lets them run as `pick` says. */
function run({ ahead, ...shape }: Case, pick: Pick | null, ignore: string[] = []) {
  const { tokens, chunk, layers: layerCount } = shape;
  const machine = new FakeMachine(new Set(ignore));
  const launch = (work: () => void): void => (pick ? machine.compute.enqueue(work) : work());
  const layers = Array.from({ length: layerCount }, (_, i) => new ToyLayer(i, WIDTH, launch));
  // `pick` null: the CPU's own streams, which run at once.
  const store = new ActivationStore({ ...shape, width: WIDTH, ...(pick ? { computeStream: machine.compute, streams: machine } : {}) });
  using ws = new Workspace({ bytes: 1 << 16, fixed: true });
  const docStart = fromTypedArray(new Int32Array(tokens), [tokens]);
  const schedule = new LayerSchedule({
    layers,
    tokens,
    chunk,
    width: WIDTH,
    ws,
    store,
    docStart,
    ...(ahead === undefined ? {} : { prefetchAhead: ahead }),
  });
  const got: number[] = [];
  for (const seed of [1, 5]) {
    const x0 = randomNormal(tokens * WIDTH, seed);
    const weight = randomNormal(tokens * WIDTH, seed + 1);
    const part = (a: Float32Array, at: Span): Float32Array => a.slice(at.start * WIDTH, (at.start + at.length) * WIDTH);
    const writeInput = (out: { data(): Float32Array }, at: Span): void => launch(() => out.data().set(part(x0, at)));
    schedule.forward(writeInput);
    schedule.loss((hidden, dHidden, at) =>
      launch(() => {
        const h = hidden.data();
        const w = part(weight, at);
        dHidden.data().forEach((_, i, d) => {
          d[i] = (w[i] as number) * (h[i] as number);
        });
      }),
    );
    schedule.backward((dx) => launch(() => void got.push(...dx.data())));
    if (seed === 1) schedule.forwardOnly(writeInput, (hidden) => launch(() => void got.push(...hidden.data())));
  }
  if (pick) machine.drain(pick);
  for (const layer of layers) {
    got.push(...layer.grad.data());
    layer.dispose();
  }
  schedule.dispose();
  store.dispose();
  docStart.dispose();
  return { got, copies: machine.copies, plan: store.plan };
}

const base = { layers: 5, tokens: 22, chunk: 4 };
const cases: Case[] = [];
for (const layersPerSegment of [1, 2, 3]) {
  for (const deviceBytes of [0, 22 * WIDTH * 4 * 1.5]) {
    for (const stagingSlots of [2, 3, 4, 6]) {
      cases.push({ ...base, layersPerSegment, deviceBytes, stagingSlots });
      cases.push({ ...base, layersPerSegment, deviceBytes, stagingSlots, dx: 'host', scratch: 'host', ahead: 2 });
    }
  }
}
cases.push(
  { ...base, deviceBytes: 0, ahead: 1 },
  { ...base, layersPerSegment: 2, deviceBytes: 0, stagingSlots: 6, ahead: 4 },
  { ...base, chunk: 22, deviceBytes: 0, dx: 'host' },
  { ...base, chunk: 11, deviceBytes: 0, dx: 'host', layersPerSegment: 2, scratch: 'host' },
);

describe('waits', () => {
  test('late copies, eager copies and random interleavings give the same bits as running at once', () => {
    for (const c of cases) {
      const want = run(c, null).got;
      expect(want.every(Number.isFinite)).toBe(true);
      for (const pick of policies) expect(run(c, pick).got).toEqual(want);
    }
  });

  test('each stream has waits that matter: without them some interleaving gives something else', () => {
    for (const stream of ['compute', 'in', 'out']) {
      const differs = cases.some((c) => {
        const want = JSON.stringify(run(c, null).got);
        return policies.some((pick) => JSON.stringify(run(c, pick, [stream]).got) !== want);
      });
      expect(differs, `waits of '${stream}'`).toBe(true);
    }
  });

  test('backward asks for the next layer as far ahead as there are slots, and loads nothing twice for that', () => {
    const [layerCount, chunks, stagingSlots] = [4, 4, 4];
    const machine = new FakeMachine();
    const layers = Array.from({ length: layerCount }, (_, i) => new ToyLayer(i, WIDTH, (work) => machine.compute.enqueue(work)));
    const tokens = chunks * 2;
    const store = new ActivationStore({
      ...{ layers: layerCount, tokens, chunk: 2, width: WIDTH, deviceBytes: 0, stagingSlots },
      ...{ computeStream: machine.compute, streams: machine },
    });
    using ws = new Workspace({ bytes: 1 << 16, fixed: true });
    const schedule = new LayerSchedule({ layers, tokens, chunk: 2, width: WIDTH, ws, store });
    let loads = 0;
    const input = machine.streams[1] as FakeStream;
    const copyIn = input.copy.bind(input);
    input.copy = (dst, src) => {
      loads++;
      copyIn(dst, src);
    };
    schedule.forward(() => {});
    schedule.loss(() => {});
    loads = 0;
    const before: number[] = [];
    schedule.backward(undefined, {
      onProgress: ({ phase, chunk }) => {
        if (phase === 'backward' && chunk === 0) before.push(loads); // as the last call of a layer was queued
      },
    });
    const all = before.at(-1) as number;
    // By then three chunks of the next layer were on their way; its fourth takes the place that the last call frees.
    expect(before).toEqual(before.map((_, i) => all - (layerCount - 1 - i) * chunks + (i < layerCount - 1 ? stagingSlots - 1 : 0)));
    expect(all).toBeLessThanOrEqual(layerCount * chunks);
    for (const layer of layers) layer.dispose();
    schedule.dispose();
    store.dispose();
  });

  test('copies: host-tier checkpoints are written once, and read twice in backward', () => {
    // One layer call per chunk reads the checkpoint: forward once (unless it is still in a staging slot), fill once, backward once.
    const { copies, plan } = run({ ...base, deviceBytes: 0 }, byName('compute', 'in', 'out'));
    const slots = plan.segments * plan.chunks;
    const hidden = plan.chunks; // the loss's copies
    const steps = 2;
    expect(copies).toBeLessThanOrEqual(steps * (slots * 4 + hidden) + 2 * plan.chunks * 6);
    const kept = run(base, byName('compute', 'in', 'out'));
    expect(kept.copies).toBe(steps * hidden);
  });
});
