import { Workspace } from '@lc/tensor';
import { expectNoLeaks, randomNormal } from '@lc/tensor/testing';
import { expect, test } from 'vitest';
import { type EventLike, LayerSchedule, type StreamFactory, type StreamLike } from '../src/index.js';
import { ToyLayer } from './toy.js';

expectNoLeaks();
const [WIDTH, TOKENS, CHUNK, LAYERS] = [5, 24, 6, 3];

function step(schedule: LayerSchedule): void {
  schedule.forward((out) => out.data().set(randomNormal(out.numel, 1)));
  schedule.loss((_, dHidden) => dHidden.data().fill(1));
  schedule.backward();
}
const makeLayers = (): ToyLayer[] => Array.from({ length: LAYERS }, (_, i) => new ToyLayer(i, WIDTH));

test('the phases of a step, and the same bits as without', async () => {
  const layers = makeLayers();
  using ws = new Workspace();
  const gradients: Float32Array[][] = [];
  for (const profile of [false, true]) {
    for (const layer of layers) layer.grad.data().fill(0);
    using schedule = new LayerSchedule({
      layers,
      tokens: TOKENS,
      chunk: CHUNK,
      width: WIDTH,
      ws,
      profile,
      storeOptions: { deviceBytes: 0 },
    });
    const from = performance.now();
    step(schedule);
    const wall = performance.now() - from;
    gradients.push(layers.map((layer) => layer.grad.data().slice()));
    if (!profile) {
      expect(() => schedule.profile()).toThrow(expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }));
      continue;
    }
    const found = await schedule.profile();
    expect(Object.keys(found).sort()).toEqual(['backward', 'fill', 'forward', 'input', 'loss', 'open']);
    expect(Object.values(found).reduce((sum, { ms }) => sum + ms, 0)).toBeLessThanOrEqual(wall);
    for (const { ms, waitMs } of Object.values(found)) expect(ms).toBeGreaterThanOrEqual(waitMs);
    expect(await schedule.profile()).toEqual({});
    step(schedule);
    expect((await schedule.profile()).backward?.ms).toBeGreaterThan(0);
  }
  expect(gradients[1]).toEqual(gradients[0]);
  for (const layer of layers) layer.dispose();
});

const plainStream = (): StreamLike => ({ copy: (dst, src) => dst.data().set(src.data()), wait() {}, async sync() {}, dispose() {} });

/** Time stands still but for the compute stream's waits, which take a second each. */
class Clock implements StreamFactory {
  now = 0;
  events = 0;
  readonly compute: StreamLike = {
    ...plainStream(),
    wait: () => {
      this.now += 1000;
    },
  };
  stream(): StreamLike {
    return plainStream();
  }
  event(): EventLike {
    this.events++;
    return new ClockEvent(this);
  }
}
class ClockEvent implements EventLike {
  private time = 0;
  constructor(private readonly clock: Clock) {}
  record(): void {
    this.time = this.clock.now;
  }
  async sync(): Promise<void> {}
  elapsedSince(earlier: EventLike): number {
    return this.time - (earlier as ClockEvent).time;
  }
  dispose(): void {
    this.clock.events--;
  }
}

test('a wait for a copy is counted in its phase, exactly; events are given back', async () => {
  const clock = new Clock();
  const layers = makeLayers();
  using ws = new Workspace();
  {
    using schedule = new LayerSchedule({
      ...{ layers, tokens: TOKENS, chunk: CHUNK, width: WIDTH, ws, profile: true },
      storeOptions: { deviceBytes: 0, computeStream: clock.compute, streams: clock },
    });
    step(schedule);
    const first = clock.now;
    const found = await schedule.profile();
    const waits = Object.values(found).reduce((sum, { waitMs }) => sum + waitMs, 0);
    expect(waits).toBe(first);
    expect(found.fill?.waitMs).toBeGreaterThan(0);
    expect(found.loss).toEqual({ ms: 0, waitMs: 0 }); // dx lies on the device
    for (const { ms, waitMs } of Object.values(found)) expect(ms).toBe(waitMs);
  }
  expect(clock.events).toBe(0);
  for (const layer of layers) layer.dispose();
});
