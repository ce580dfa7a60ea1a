import { memory, type Parameter, Workspace } from '@lc/tensor';
import { expectNoLeaks, relativeError } from '@lc/tensor/testing';
import { describe, expect, it, vi } from 'vitest';
import {
  type CausalLM,
  countSupervised,
  DecoderLayer,
  loadAdapterOnto,
  loadModel,
  type TokenSequence,
  TrainingSession,
  type TrainingSessionOptions,
} from '../src/index.js';
import { fixtures, someIds } from './helpers.js';

expectNoLeaks();

const withAdapter = async (name: string): Promise<CausalLM> => {
  const model = await loadModel(fixtures + name, { tile: 16 });
  await loadAdapterOnto(model, `${fixtures}${name}/adapter`);
  return model;
};
const zero = (parameters: readonly Parameter[]): void => {
  for (const p of parameters) p.grad.data().fill(0);
};
const gradients = (parameters: readonly Parameter[]): Float32Array[] => parameters.map((p) => p.grad.data().slice());
/** Documents of the given lengths, packed. The first two labels of each are ignored. */
function packed(lengths: readonly number[], offset = 0): TokenSequence {
  const docStart: number[] = [];
  for (const length of lengths) docStart.push(...new Array<number>(length).fill(docStart.length));
  const inputIds = someIds(docStart.length + offset).slice(offset);
  return {
    inputIds: Int32Array.from(inputIds),
    labels: Int32Array.from(inputIds, (id, i) => (i - (docStart[i] as number) < 2 ? -100 : id)),
    docStart: Int32Array.from(docStart),
  };
}
const totalAllocations = (): number => Object.values(memory().devices).reduce((sum, device) => sum + device.allocations, 0);

describe('TrainingSession', () => {
  it('packs documents without letting them see each other', async () => {
    using model = await withAdapter('gpt-oss');
    using ws = new Workspace();
    using session = new TrainingSession({ model, tokens: 50, chunk: 16, ws });
    const lengths = [17, 1, 32];
    const all = packed(lengths);
    const numTokens = countSupervised(all);
    expect(numTokens).toBe(15 + 30);
    const together = await session.step(all);
    expect(together.supervised).toBe(numTokens);
    const want = gradients(model.parameters);
    zero(model.parameters);
    let loss = 0;
    for (let d = 0, start = 0; d < lengths.length; start += lengths[d++] as number) {
      const part = (x: Int32Array): Int32Array => x.slice(start, start + (lengths[d] as number));
      const sequence = { inputIds: part(all.inputIds), labels: part(all.labels) };
      loss += (await session.step(sequence, { numTokens })).loss;
    }
    expect(loss).toBeCloseTo(together.loss, 5);
    for (const [i, grad] of gradients(model.parameters).entries()) expect(relativeError(grad, want[i] as Float32Array)).toBeLessThan(1e-5);
  });

  it('gives the same gradients from every tier, and allocates nothing after the first step', async () => {
    using model = await withAdapter('qwen3-moe');
    const sequence = packed([41, 22]);
    const run = async (
      storeOptions: NonNullable<ConstructorParameters<typeof TrainingSession>[0]['storeOptions']>,
    ): Promise<Float32Array[]> => {
      using ws = new Workspace();
      using session = new TrainingSession({ model, tokens: 63, chunk: 16, lossChunk: 8, ws, storeOptions });
      zero(model.parameters);
      const first = await session.step(sequence, { dropoutSeed: 1 });
      const want = gradients(model.parameters);
      zero(model.parameters);
      const before = totalAllocations();
      const second = await session.step(sequence, { dropoutSeed: 1 });
      expect(totalAllocations() - before).toBe(0);
      expect(second).toEqual(first);
      expect(gradients(model.parameters)).toEqual(want);
      return want;
    };
    const device = await run({});
    expect(await run({ deviceBytes: 0 })).toEqual(device);
    expect(await run({ deviceBytes: 0, layersPerSegment: 2, dx: 'host', scratch: 'host' })).toEqual(device);
  });

  it('keeps attention outputs for backward: the same bits, and no attention forward a second time', async () => {
    using model = await withAdapter('gpt-oss');
    const sequence = packed([41, 22]);
    const full = model.layers.filter((layer) => layer.keepBytes('f32') > 0).length;
    expect(full).toBeGreaterThan(0);
    expect(full).toBeLessThan(model.layers.length); // windowed layers keep nothing
    const attend = vi.spyOn(DecoderLayer.prototype as unknown as { attend: () => void }, 'attend');
    const run = async (options: Partial<TrainingSessionOptions>): Promise<[Float32Array[], number, number]> => {
      using ws = new Workspace();
      using session = new TrainingSession({ model, tokens: 63, chunk: 16, lossChunk: 8, ws, ...options });
      await session.step(sequence, { dropoutSeed: 1 });
      zero(model.parameters);
      attend.mockClear();
      const before = totalAllocations();
      await session.step(sequence, { dropoutSeed: 1 });
      expect(totalAllocations() - before).toBe(0);
      const kept = Object.values(memory().devices).reduce((sum, device) => sum + (device.byLabel.kept?.liveBytes ?? 0), 0);
      return [gradients(model.parameters), attend.mock.calls.length, kept];
    };
    const [want, calls, none] = await run({});
    expect(none).toBe(0);
    const perToken = Math.max(...model.layers.map((layer) => layer.keepBytes('f32')));
    for (const storeOptions of [{}, { deviceBytes: 0 }, { deviceBytes: 0, layersPerSegment: 2 }]) {
      for (const [keep, tokens, chunks] of [
        [{}, 63, 4],
        [{ deviceBytes: 0 }, 63, 4],
        [{ layers: 1, deviceBytes: 20 * perToken }, 63, 4],
        [{ tokens: 40 }, 31, 2], // the last chunk of 15 and one of 16: whole chunks
        [{ tokens: 62, deviceBytes: 0 }, 47, 3],
        [{ tokens: 14 }, 0, 0],
      ] as const) {
        const [got, fewer, kept] = await run({ storeOptions, keep });
        expect(got).toEqual(want);
        const layers = 'layers' in keep ? keep.layers : full;
        expect(kept).toBe(tokens * perToken * layers);
        // Each kept layer saves its kept chunks in backward; a segment's recomputed layers come on top.
        if (!('layersPerSegment' in storeOptions)) expect(calls - fewer).toBe(chunks * layers);
      }
    }
    attend.mockRestore();
    await expect(run({ keep: { layers: -1 } })).rejects.toMatchObject({ code: 'ERR_LC_ARGUMENT' });
    await expect(run({ keep: { tokens: 1.5 } })).rejects.toMatchObject({ code: 'ERR_LC_ARGUMENT' });
  });

  it('keeps the last tokens of shorter sequences as well, in the memory of the longest', async () => {
    using model = await withAdapter('gpt-oss');
    const full = model.layers.filter((layer) => layer.keepBytes('f32') > 0).length;
    const attend = vi.spyOn(DecoderLayer.prototype as unknown as { attend: () => void }, 'attend');
    const sequences = [packed([63]), packed([48]), packed([30, 19]), packed([64]), packed([17]), packed([9])];
    const run = async (keep: TrainingSessionOptions['keep']): Promise<{ gradients: Float32Array[][]; calls: number[] }> => {
      using ws = new Workspace();
      using session = new TrainingSession({ model, tokens: 65, chunk: 16, lossChunk: 8, ws, ...(keep ? { keep } : {}) });
      const result = { gradients: [] as Float32Array[][], calls: [] as number[] };
      for (const sequence of sequences) {
        zero(model.parameters);
        attend.mockClear();
        await session.step(sequence);
        result.gradients.push(gradients(model.parameters));
        result.calls.push(attend.mock.calls.length);
      }
      return result;
    };
    const want = await run(undefined);
    // Of 65 tokens 33 are kept: the last two whole chunks and the one token behind them. Sequences of 63 and 64 have room for their last two chunks, of 49 for the last three.
    const got = await run({ tokens: 33 });
    expect(got.gradients).toEqual(want.gradients);
    expect(want.calls.map((calls, i) => (calls - (got.calls[i] as number)) / full)).toEqual([2, 2, 3, 2, 2, 1]);
    const little = await run({ tokens: 1 }); // room for one token: of 65 and 49 only
    expect(little.gradients).toEqual(want.gradients);
    expect(want.calls.map((calls, i) => (calls - (little.calls[i] as number)) / full)).toEqual([0, 0, 1, 0, 1, 0]);
    attend.mockRestore();
  });

  it('tells the layers whether to be deterministic; on the CPU they are', async () => {
    using model = await withAdapter('gpt-oss');
    const sequence = packed([23, 18]);
    const run = async (options: Partial<TrainingSessionOptions>): Promise<Float32Array[]> => {
      using ws = new Workspace();
      using session = new TrainingSession({ model, tokens: 41, chunk: 16, ws, ...options });
      zero(model.parameters);
      await session.step(sequence);
      return gradients(model.parameters);
    };
    const want = await run({});
    expect(model.layers.every((layer) => layer.deterministic)).toBe(true);
    expect(await run({ deterministic: false })).toEqual(want);
    expect(model.layers.some((layer) => layer.deterministic)).toBe(false);
    await run({});
    expect(model.layers.every((layer) => layer.deterministic)).toBe(true);
  });

  it('evaluates without gradients', async () => {
    using model = await withAdapter('llama');
    using ws = new Workspace();
    const sequence = packed([30]);
    using training = new TrainingSession({ model, tokens: 30, chunk: 8, ws });
    using evaluating = new TrainingSession({ model, tokens: 30, chunk: 8, ws, evaluateOnly: true });
    const { loss } = await evaluating.evaluate(sequence);
    expect(gradients(model.parameters).every((grad) => grad.every((value) => value === 0))).toBe(true);
    expect((await training.evaluate(sequence)).loss).toBe(loss);
    expect((await training.step(sequence)).loss).toBe(loss);
    await expect(evaluating.step(sequence)).rejects.toMatchObject({ code: 'ERR_LC_ARGUMENT' });
  });

  it('refuses what it cannot learn from, and stops at a signal', async () => {
    using model = await withAdapter('llama');
    using ws = new Workspace();
    using session = new TrainingSession({ model, tokens: 30, chunk: 8, ws });
    const sequence = packed([30]);
    await expect(session.step({ ...sequence, labels: new Int32Array(30).fill(-100) })).rejects.toMatchObject({
      code: 'ERR_LC_NOTHING_SUPERVISED',
    });
    await expect(session.step(packed([31]))).rejects.toMatchObject({ code: 'ERR_LC_ARGUMENT' });
    await expect(session.step({ ...sequence, labels: new Int32Array(3) })).rejects.toMatchObject({ code: 'ERR_LC_ARGUMENT' });
    await expect(session.step({ ...sequence, inputIds: Int32Array.from(sequence.inputIds, () => 512) })).rejects.toMatchObject({
      code: 'ERR_LC_ARGUMENT',
    });
    await expect(session.step({ ...sequence, docStart: Int32Array.from(sequence.labels, () => 5) })).rejects.toThrow();
    const controller = new AbortController();
    let calls = 0;
    const onProgress = (): void => {
      if (++calls === 6) controller.abort();
    };
    await expect(session.step(sequence, { onProgress, signal: controller.signal })).rejects.toMatchObject({ code: 'ERR_LC_ABORTED' });
    zero(model.parameters);
    const after = await session.step(sequence);
    const fresh = gradients(model.parameters);
    zero(model.parameters);
    expect(await session.step(sequence)).toEqual(after);
    expect(gradients(model.parameters)).toEqual(fresh);
  });
});
