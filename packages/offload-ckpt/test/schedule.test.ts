import { fromTypedArray, type LcError, memory, type Span, type Tensor, Workspace } from '@lc/tensor';
import { expectNoLeaks, randomNormal, relativeError } from '@lc/tensor/testing';
import { describe, expect, test } from 'vitest';
import { LayerSchedule, type LayerScheduleOptions, type Progress } from '../src/index.js';
import { reference, ToyLayer } from './toy.js';

expectNoLeaks();

const WIDTH = 5;
const documents = (n: number): Int32Array =>
  Int32Array.from({ length: n }, (_, t) => (t >= Math.ceil(n / 3) && n > 3 ? Math.ceil(n / 3) : 0));

interface Result {
  hidden: Float32Array;
  dv: Float32Array[];
  dx: Float32Array;
}

/** One step (or several) of a toy stack through the schedule. */
function runStep(n: number, layerCount: number, options: Partial<LayerScheduleOptions> & { chunk: number }, steps = 1, seed = 1): Result {
  const layers = Array.from({ length: layerCount }, (_, i) => new ToyLayer(i, WIDTH));
  const docStart = fromTypedArray(documents(n), [n]);
  const ws = new Workspace();
  const schedule = new LayerSchedule({ layers, tokens: n, width: WIDTH, ws, docStart, verifyRecompute: true, ...options });
  const x0 = randomNormal(n * WIDTH, seed);
  const weight = randomNormal(n * WIDTH, seed + 1);
  const result: Result = { hidden: new Float32Array(n * WIDTH), dv: [], dx: new Float32Array(n * WIDTH) };
  const part = (a: Float32Array, at: Span): Float32Array => a.subarray(at.start * WIDTH, (at.start + at.length) * WIDTH);
  let allocations = -1;
  const count = (): number => Object.values(memory().devices).reduce((sum, d) => sum + d.allocations, 0);
  for (let step = 0; step < steps; step++) {
    for (const layer of layers) layer.grad.data().fill(0);
    schedule.forward((out, at) => out.data().set(part(x0, at)));
    schedule.loss((hidden, dHidden, at) => {
      expect(hidden.handle).not.toBe(dHidden.handle);
      part(result.hidden, at).set(hidden.data());
      dHidden.data().set(part(weight, at));
    });
    schedule.backward((dx, at) => part(result.dx, at).set(dx.data()));
    if (step >= 1) {
      if (allocations >= 0) expect(count()).toBe(allocations);
      allocations = count();
    }
  }
  for (const layer of layers) {
    expect(layer.opened).toBe(0);
    result.dv.push(layer.grad.data().slice());
    layer.dispose();
  }
  expect(ws.usedBytes).toBe(0);
  schedule.dispose();
  ws.dispose();
  docStart.dispose();
  return result;
}

const rowBytes = (n: number): number => n * WIDTH * 4;

describe('the toy layer', () => {
  test('reference gradients agree with finite differences', () => {
    const n = 7;
    const [x, w] = [Float64Array.from(randomNormal(n * WIDTH, 1)), Float64Array.from(randomNormal(n * WIDTH, 2))];
    const v = [3, 4, 5].map((s) => Float64Array.from(randomNormal(WIDTH, s, 0.3)));
    const doc = documents(n);
    const loss = (): number => reference(x, w, v, WIDTH, doc).hidden.reduce((sum, h, i) => sum + h * (w[i] as number), 0);
    const { dv, dx } = reference(x, w, v, WIDTH, doc);
    const check = (array: Float64Array, gradient: Float64Array): void => {
      for (let i = 0; i < array.length; i++) {
        const [at, h] = [array[i] as number, 1e-5];
        array[i] = at + h;
        const up = loss();
        array[i] = at - h;
        const down = loss();
        array[i] = at;
        expect(Math.abs((up - down) / (2 * h) - (gradient[i] as number))).toBeLessThan(1e-7);
      }
    };
    check(x, dx);
    v.forEach((values, l) => check(values, dv[l] as Float64Array));
  });
});

describe('LayerSchedule', () => {
  for (const [n, layerCount] of [
    [1, 1],
    [7, 2],
    [45, 5],
    [131, 6],
  ] as const) {
    const whole = runStep(n, layerCount, { chunk: n });

    test(`${n} tokens, ${layerCount} layers: whole sequence against the f64 reference`, () => {
      const layers = Array.from({ length: layerCount }, (_, i) => new ToyLayer(i, WIDTH));
      const values = layers.map((layer) => layer.v.data().slice());
      const want = reference(randomNormal(n * WIDTH, 1), randomNormal(n * WIDTH, 2), values, WIDTH, documents(n));
      for (const layer of layers) layer.dispose();
      expect(relativeError(whole.hidden, want.hidden)).toBeLessThan(2e-6);
      expect(relativeError(whole.dx, want.dx)).toBeLessThan(2e-6);
      want.dv.forEach((dv, l) => expect(relativeError(whole.dv[l] as Float32Array, dv)).toBeLessThan(5e-6));
    });

    for (const chunk of [1, 7, 32]) {
      for (const layersPerSegment of [1, 2, 3]) {
        test(`${n} tokens, ${layerCount} layers: chunks of ${chunk}, segments of ${layersPerSegment}, every tier: the same bits`, () => {
          const segments = Math.ceil(layerCount / layersPerSegment);
          for (const deviceBytes of [Number.POSITIVE_INFINITY, (rowBytes(n) * segments) / 2, 0]) {
            for (const rest of [{}, { dx: 'host', scratch: 'host' } as const]) {
              for (const stagingSlots of [undefined, 2, 3, 9]) {
                const storeOptions = { layersPerSegment, deviceBytes, ...rest, ...(stagingSlots ? { stagingSlots } : {}) };
                expect(runStep(n, layerCount, { chunk, storeOptions })).toEqual(whole);
              }
            }
          }
        });
      }
    }
  }

  test('prefetchAhead does not change a bit', () => {
    const whole = runStep(45, 4, { chunk: 45 });
    for (const prefetchAhead of [0, 2, 5]) {
      const storeOptions = { layersPerSegment: 3, deviceBytes: 0, dx: 'host', scratch: 'host', stagingSlots: 8 } as const;
      expect(runStep(45, 4, { chunk: 7, prefetchAhead, storeOptions })).toEqual(whole);
    }
  });

  test('a step after the second allocates nothing', () => {
    for (const deviceBytes of [0, rowBytes(45) * 2]) runStep(45, 4, { chunk: 7, storeOptions: { deviceBytes, layersPerSegment: 2 } }, 4);
  });

  test('visits chunks in the order that exactness needs', () => {
    const layers = [new ToyLayer(0, 2), new ToyLayer(1, 2)];
    using ws = new Workspace();
    using schedule = new LayerSchedule({ layers, tokens: 5, chunk: 2, width: 2, ws });
    schedule.forward((out) => out.data().fill(1));
    schedule.loss((_, dHidden) => dHidden.data().fill(1));
    schedule.backward();
    const pass = ['fill 0', 'forward 0', 'fill 2', 'forward 2', 'fill 4', 'forward 4'];
    for (const layer of layers) {
      expect(layer.calls).toEqual([...pass, 'fill 0', 'fill 2', 'fill 4', 'backward 4', 'backward 2', 'backward 0']);
      layer.dispose();
    }
  });

  test('a shorter sequence in the same schedule gives what its own schedule gives', () => {
    const layers = [0, 1, 2].map((i) => new ToyLayer(i, WIDTH));
    using ws = new Workspace();
    const storeOptions = { deviceBytes: rowBytes(45) + 100, dx: 'host' } as const;
    using schedule = new LayerSchedule({ layers, tokens: 45, chunk: 7, width: WIDTH, ws, storeOptions });
    for (const n of [45, 20, 3, 45, 33]) {
      const docStart = fromTypedArray(documents(n), [n]);
      schedule.begin({ tokens: n, docStart });
      const [x0, weight] = [randomNormal(n * WIDTH, 1), randomNormal(n * WIDTH, 2)];
      const dx = new Float32Array(n * WIDTH);
      const part = (a: Float32Array, at: Span): Float32Array => a.subarray(at.start * WIDTH, (at.start + at.length) * WIDTH);
      schedule.forward((out, at) => out.data().set(part(x0, at)));
      schedule.loss((_, dHidden, at) => dHidden.data().set(part(weight, at)));
      schedule.backward((d, at) => part(dx, at).set(d.data()));
      expect(dx).toEqual(runStep(n, 3, { chunk: n }).dx);
      docStart.dispose();
    }
    for (const layer of layers) layer.dispose();
  });

  test('forwardOnly: the same hidden states, no dropout, two buffers', () => {
    for (const layerCount of [1, 2, 5]) {
      const want = runStep(45, layerCount, { chunk: 45 }).hidden;
      const layers = Array.from({ length: layerCount }, (_, i) => new ToyLayer(i, WIDTH));
      const docStart = fromTypedArray(documents(45), [45]);
      using ws = new Workspace();
      for (const evaluateOnly of [true, false]) {
        for (const deviceBytes of [undefined, 0]) {
          const storeOptions = { layersPerSegment: 2, ...(deviceBytes === undefined ? {} : { deviceBytes }) };
          using schedule = new LayerSchedule({
            layers,
            tokens: 45,
            chunk: 7,
            width: WIDTH,
            ws,
            docStart,
            dropoutSeed: 9,
            evaluateOnly,
            storeOptions,
          });
          const got = new Float32Array(45 * WIDTH);
          const x0 = randomNormal(45 * WIDTH, 1);
          schedule.forwardOnly(
            (out, at) => out.data().set(x0.subarray(at.start * WIDTH, (at.start + at.length) * WIDTH)),
            (hidden, at) => {
              expect(at.dropoutSeed).toBeUndefined();
              got.set(hidden.data(), at.start * WIDTH);
            },
          );
          expect(got).toEqual(want);
          expect(schedule.spans[0]?.dropoutSeed).toBe(9);
          if (evaluateOnly) {
            const { bytes } = schedule.store.plan;
            expect(bytes.checkpointsOnDevice + bytes.checkpointsOnHost + bytes.dx + bytes.scratch).toBe(2 * rowBytes(45));
            expect(() => schedule.forward(() => {})).toThrow(/evaluateOnly/);
          }
        }
      }
      docStart.dispose();
      for (const layer of layers) layer.dispose();
    }
  });

  test('async: progress, the event loop runs, the same bits; abort puts everything away', async () => {
    const n = 45;
    const layers = [0, 1, 2].map((i) => new ToyLayer(i, WIDTH));
    using ws = new Workspace();
    using schedule = new LayerSchedule({
      layers,
      tokens: n,
      chunk: 7,
      width: WIDTH,
      ws,
      storeOptions: { deviceBytes: 0, layersPerSegment: 2 },
    });
    const x0 = randomNormal(n * WIDTH, 1);
    const weight = randomNormal(n * WIDTH, 2);
    const writeInput = (out: Tensor, at: Span): void => out.data().set(x0.subarray(at.start * WIDTH, (at.start + at.length) * WIDTH));
    const loss = (_: Tensor, dHidden: Tensor, at: Span): void =>
      dHidden.data().set(weight.subarray(at.start * WIDTH, (at.start + at.length) * WIDTH));
    const step = async (signal?: AbortSignal, onProgress?: (p: Progress) => void): Promise<Float32Array[]> => {
      for (const layer of layers) layer.grad.data().fill(0);
      await schedule.forwardAsync(writeInput, { signal, onProgress });
      await schedule.lossAsync(loss, { signal, onProgress });
      await schedule.backwardAsync(undefined, { signal, onProgress });
      return layers.map((layer) => layer.grad.data().slice());
    };
    const seen: Progress[] = [];
    let turns = 0;
    const timer = setInterval(() => turns++, 0);
    const want = await step(undefined, (p) => seen.push(p));
    clearInterval(timer);
    expect(turns).toBeGreaterThan(0);
    expect(seen.filter((p) => p.phase === 'forward').map((p) => [p.layer, p.chunk])).toEqual(
      [0, 1, 2].flatMap((l) => [0, 1, 2, 3, 4, 5, 6].map((c) => [l, c])),
    );
    expect(seen.filter((p) => p.phase === 'backward' && p.layer === 2).map((p) => p.chunk)).toEqual([6, 5, 4, 3, 2, 1, 0]);
    expect(seen.some((p) => p.phase === 'recompute' && p.layer === 0)).toBe(true);
    expect(seen.at(-1)?.done).toBe(seen.at(-1)?.total);

    for (const stopAt of [1, 9, 30, 40, 55]) {
      const controller = new AbortController();
      let calls = 0;
      const aborted = step(controller.signal, () => {
        if (++calls === stopAt) controller.abort(new Error('enough'));
      });
      await expect(aborted).rejects.toMatchObject({ code: 'ERR_LC_ABORTED' });
      expect(ws.usedBytes).toBe(0);
      for (const layer of layers) expect(layer.opened).toBe(0);
    }
    await expect(schedule.forwardAsync(writeInput, { signal: AbortSignal.abort() })).rejects.toMatchObject({ code: 'ERR_LC_ABORTED' });
    const running = schedule.forwardAsync(writeInput);
    expect(() => schedule.begin()).toThrow(/running/);
    await expect(schedule.forwardAsync(writeInput)).rejects.toThrow(/running/);
    await running;
    expect(await step()).toEqual(want);
    for (const layer of layers) layer.dispose();
  });

  test('a callback that throws leaves the schedule usable', () => {
    const layers = [0, 1].map((i) => new ToyLayer(i, WIDTH));
    using ws = new Workspace();
    using schedule = new LayerSchedule({ layers, tokens: 20, chunk: 7, width: WIDTH, ws, storeOptions: { deviceBytes: 0 } });
    const boom = (): void => {
      throw new Error('boom');
    };
    const fill = (out: Tensor): void => void out.data().fill(0.5);
    for (let round = 0; round < 3; round++) {
      expect(() => schedule.forward(boom)).toThrow('boom');
      schedule.forward(fill);
      expect(() => schedule.loss(boom)).toThrow('boom');
      expect(() => schedule.backward()).toThrow(/forward and loss first/);
      schedule.forward(fill);
      schedule.loss((_, d) => fill(d));
      expect(() => schedule.backward(boom)).toThrow('boom');
      expect(ws.usedBytes).toBe(0);
    }
    for (const layer of layers) {
      expect(layer.opened).toBe(0);
      layer.dispose();
    }
  });

  test('verifyRecompute catches a layer that is not deterministic', () => {
    class Drifting extends ToyLayer {
      override forward(...args: Parameters<ToyLayer['forward']>): void {
        super.forward(...args);
        const out = args[1].data();
        if (this.calls.length > 8 && args[2].start === 7) out[3] = (out[3] as number) * (1 + 2 ** -23);
      }
    }
    for (const layersPerSegment of [1, 2]) {
      const layers = [new Drifting(0, WIDTH), new ToyLayer(1, WIDTH), new ToyLayer(2, WIDTH)];
      using ws = new Workspace();
      using schedule = new LayerSchedule({
        layers,
        tokens: 20,
        chunk: 7,
        width: WIDTH,
        ws,
        verifyRecompute: true,
        storeOptions: { layersPerSegment },
      });
      schedule.forward((out) => out.data().fill(1));
      schedule.loss((_, d) => d.data().fill(1));
      expect(() => schedule.backward()).toThrow(/layer 0 recomputed another output.*token 7, feature 3/);
      for (const layer of layers) layer.dispose();
    }
  });

  test.each([1, 2])('a probe of the first two of five layers is a step of these two (a checkpoint every %i layers)', (layersPerSegment) => {
    const gradients = (count: number, run: number): number[] => {
      const layers = Array.from({ length: count }, (_, i) => new ToyLayer(i, WIDTH));
      using ws = new Workspace();
      using schedule = new LayerSchedule({
        ...{ layers, tokens: 12, chunk: 4, width: WIDTH, ws },
        storeOptions: { deviceBytes: 0, layersPerSegment },
      });
      const step = (n: number): void => {
        schedule.begin({ layers: n });
        schedule.forward((out, at) => out.data().fill(1 + at.start));
        schedule.loss((_, d) => d.data().fill(1));
        schedule.backward();
      };
      step(count); // the memory of all layers was in use before
      for (const layer of layers) layer.grad.data().fill(0);
      step(run);
      expect(() => schedule.begin({ layers: count + 1 })).toThrow(/layers is/);
      const out = layers.flatMap((layer) => [...layer.grad.data()]);
      for (const layer of layers) layer.dispose();
      return out;
    };
    const five = gradients(5, 2);
    expect(five.slice(0, 2 * WIDTH)).toEqual(gradients(2, 2));
    expect(five.slice(2 * WIDTH).every((value) => value === 0)).toBe(true);
  });

  test('bad input is refused with a code', () => {
    const layers = [new ToyLayer(0, WIDTH)];
    using ws = new Workspace();
    const base = { layers, tokens: 8, chunk: 4, width: WIDTH, ws };
    const code = (over: object): string => {
      try {
        new LayerSchedule({ ...base, ...over }).dispose();
        return 'none';
      } catch (error) {
        return (error as LcError).code;
      }
    };
    expect(code({})).toBe('none');
    expect(code({ layers: [] })).toBe('ERR_LC_ARGUMENT');
    expect(code({ chunk: 0 })).toBe('ERR_LC_ARGUMENT');
    expect(code({ tokens: 1.5 })).toBe('ERR_LC_ARGUMENT');
    expect(code({ width: Number.NaN })).toBe('ERR_LC_ARGUMENT');
    expect(code({ storeOptions: { deviceBytes: 0, hostBytes: 10 } })).toBe('ERR_LC_PLAN');
    expect(code({ storeOptions: { deviceBytes: -1 } })).toBe('ERR_LC_ARGUMENT');
    expect(code({ storeOptions: { deviceBytes: 0, stagingSlots: 1 } })).toBe('ERR_LC_ARGUMENT');
    expect(code({ storeOptions: { dx: 'disk' } })).toBe('ERR_LC_ARGUMENT');
    const docStart = fromTypedArray(new Int32Array(7), [7]);
    expect(code({ docStart })).toBe('ERR_LC_SHAPE');
    docStart.dispose();
    using schedule = new LayerSchedule(base);
    expect(() => schedule.loss(() => {})).toThrow(/call forward first/);
    expect(() => schedule.begin({ tokens: 9 })).toThrow(/9 tokens/);
    expect(code({ layers: [...layers, ...layers], store: schedule.store })).toBe('ERR_LC_SHAPE');
    layers[0]?.dispose();
  });
});
