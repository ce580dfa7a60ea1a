import { attachLora, type CausalLM, loadModel } from '@lc/models';
import { deviceMemory, setRamLimit } from '@lc/tensor';
import { expectNoLeaks } from '@lc/tensor/testing';
import { afterEach, describe, expect, it } from 'vitest';
import { StepMemory } from '../src/index.js';

expectNoLeaks();
afterEach(() => setRamLimit(null));
const GiB = 2 ** 30;

async function adapted(): Promise<CausalLM> {
  const model = await loadModel(new URL('../../../test/fixtures/reference-models/gpt-oss', import.meta.url).pathname, { loadIn4bit: true });
  attachLora(model, { r: 4, targetModules: ['q_proj', 'v_proj'] });
  return model;
}
const live = (): number => deviceMemory('cpu').liveBytes + deviceMemory('host').liveBytes;

describe('StepMemory', () => {
  it('stays while nothing changes, and is planned again for a longer sequence', async () => {
    using model = await adapted();
    using memory = new StepMemory({ model, tokens: 128, budgets: { vram: 4 * GiB, ram: 4 * GiB } });
    const { session } = memory;
    expect([await memory.prepare(128), await memory.prepare(7)]).toEqual([null, null]);
    expect(memory.session).toBe(session);
    expect(await memory.prepare(200)).toBe('a sequence of 200 tokens');
    expect(memory.plan.tokens).toBe(200);
    expect(memory.session).not.toBe(session);
    const inputIds = new Int32Array(200).fill(3);
    expect(Number.isFinite((await memory.session.step({ inputIds, labels: inputIds })).loss)).toBe(true);
    expect(await memory.prepare(128)).toBeNull(); // a shorter one fits
  });

  it('free memory: with hysteresis, and sizes that decide bits stay', async () => {
    using model = await adapted();
    let free = 40 * GiB;
    const budgets = () => ({ vram: free, ram: free });
    using memory = new StepMemory({ model, tokens: 256, chunk: 64, budgets });
    const { plan, session } = memory;
    free = 39.5 * GiB; // less than 1 GiB
    expect(await memory.prepare(256)).toBeNull();
    free = 37 * GiB; // less than 10%
    expect(await memory.prepare(256)).toBeNull();
    free = 20 * GiB; // much, but the plan would be the same
    expect(await memory.prepare(256)).toBeNull();
    expect(memory.session).toBe(session);
    expect(memory.plan).toBe(plan);
  });

  it('free memory that allows much more to be kept moves it, with the same sizes', async () => {
    using model = await adapted();
    using roomy = new StepMemory({ model, tokens: 2048, keep: 0 });
    const need = roomy.plan.predictedPeak.device + roomy.plan.predictedPeak.host;
    const base = live();
    let total = need;
    const budgets = () => ({ vram: base + total - live(), ram: base + total - live() });
    using memory = new StepMemory({ model, tokens: 2048, chunk: roomy.plan.chunk, tile: roomy.plan.tile, budgets }, 1 << 10);
    expect(memory.plan.keep.layers).toBe(0);
    total = 4 * need;
    expect(await memory.prepare(2048)).toBe('free memory changed');
    expect(memory.plan).toMatchObject({ chunk: roomy.plan.chunk, tile: roomy.plan.tile, lossChunk: roomy.plan.lossChunk });
    expect(memory.plan.keep.layers).toBeGreaterThan(0);
    expect(await memory.prepare(2048)).toBeNull();
  });

  it('limits: a smaller one shrinks the plan, one that is still kept changes nothing, one too small says so', async () => {
    using model = await adapted();
    const base = live();
    using memory = new StepMemory({ model, tokens: 2048 });
    const need = live() - base;
    const { session } = memory;
    memory.setLimits({ ramLimit: base + 4 * need });
    expect(await memory.prepare(2048)).toBeNull();
    expect(memory.session).toBe(session);
    memory.setLimits({ ramLimit: Math.floor(base + 0.6 * need) });
    expect(await memory.prepare(2048)).toMatch(/^ramLimit \d+ -> \d+$/);
    expect(live() - base).toBeLessThanOrEqual(0.6 * need);
    memory.setLimits({ ramLimit: null });
    expect(await memory.prepare(2048)).toBeNull(); // what would be gained is less than 1 GiB
    memory.setLimits({ ramLimit: base + 1000 });
    await expect(memory.prepare(2048)).rejects.toMatchObject({ code: 'ERR_LC_PLAN', message: expect.stringContaining('RAM') });
    expect(live()).toBe(base);
  });
});
