import { attachLora, type CausalLM, loadModel } from '@lc/models';
import { AdamW } from '@lc/qlora';
import { deviceMemory, setRamLimit } from '@lc/tensor';
import { expectNoLeaks, seededRandom } from '@lc/tensor/testing';
import { describe, expect, it } from 'vitest';
import { planStep, reserveStep } from '../src/index.js';

expectNoLeaks();
const fixture = (name: string): string => new URL(`../../../test/fixtures/reference-models/${name}`, import.meta.url).pathname;

async function adapted(name: string): Promise<CausalLM> {
  const model = await loadModel(fixture(name), { loadIn4bit: name !== 'llama' });
  attachLora(model, { r: 4, targetModules: ['q_proj', 'k_proj', 'v_proj', 'o_proj'] });
  return model;
}

function sequence(tokens: number, vocab: number) {
  const random = seededRandom(tokens);
  const inputIds = Int32Array.from({ length: tokens }, () => Math.floor(random() * vocab));
  return { inputIds, labels: inputIds };
}

const allocations = (): number => deviceMemory('cpu').allocations + deviceMemory('host').allocations;

describe('reserveStep', () => {
  it.each(['llama', 'gpt-oss', 'qwen3-moe'])('%s: the first step allocates nothing, at any size', async (name) => {
    using model = await adapted(name);
    using optimizer = new AdamW(model.parameters);
    for (const sizes of [
      {},
      { chunk: 100, tile: 33, lossChunk: 7 },
      { chunk: 64, tile: 512, layersPerSegment: 2, checkpointDeviceBytes: 0 },
    ]) {
      const warnings: string[] = [];
      using reserved = reserveStep({ model, tokens: 300, ...sizes, onWarning: (message) => warnings.push(message) });
      expect(reserved.attempts).toEqual([]);
      if ('chunk' in sizes) expect(reserved.plan).toMatchObject({ chunk: sizes.chunk, tile: sizes.tile });
      const before = allocations();
      const { loss } = await reserved.session.step(sequence(300, model.config.vocabSize));
      optimizer.step({ maxGradNorm: 1 });
      expect(allocations() - before).toBe(0);
      expect(Number.isFinite(loss)).toBe(true);
      expect(warnings).toEqual([]);
      expect(reserved.workspace.peakBytes).toBeLessThanOrEqual(reserved.plan.bytes.workspace);
    }
  });

  it('a reservation that fails shrinks the plan, and nothing has been computed', async () => {
    using model = await adapted('gpt-oss');
    const live = deviceMemory('cpu').liveBytes + deviceMemory('host').liveBytes;
    const plenty = { vram: 2 ** 34, ram: 2 ** 34 };
    using roomy = reserveStep({ model, tokens: 2048, budgets: plenty });
    const need = roomy.plan.predictedPeak.device + roomy.plan.predictedPeak.host;
    roomy.dispose();
    try {
      // The budgets promise more than the allocator gives.
      const warnings: string[] = [];
      const onWarning = (message: string): number => warnings.push(message);
      using tight = reserveStep({ model, tokens: 2048, budgets: plenty, ramLimit: Math.floor(live + need * 0.6), onWarning });
      expect(warnings).toEqual([expect.stringMatching(/reservations? failed .*ramLimit.* runs with a smaller plan: chunk \d+/)]);
      expect(tight.attempts.length).toBeGreaterThan(0);
      for (const attempt of tight.attempts) expect(attempt).toMatchObject({ failed: 'RAM', message: expect.stringContaining('ramLimit') });
      expect(tight.plan.predictedPeak.device + tight.plan.predictedPeak.host).toBeLessThan(need * 0.6);
      expect(model.parameters.every((p) => p.grad.data().every((v) => v === 0))).toBe(true);
      const { loss } = await tight.session.step(sequence(2048, model.config.vocabSize));
      expect(Number.isFinite(loss)).toBe(true);
      tight.dispose();
      const before = deviceMemory('cpu').liveBytes + deviceMemory('host').liveBytes;
      expect(() => reserveStep({ model, tokens: 2048, budgets: plenty, ramLimit: live + (4 << 20) })).toThrow(
        expect.objectContaining({
          message: expect.stringMatching(/2048 tokens do not fit: .*longest length that fits: \d+.*the last reservation failed: RAM/s),
        }),
      );
      expect(deviceMemory('cpu').liveBytes + deviceMemory('host').liveBytes).toBe(before); // nothing stays
      // Measured budgets see the limit, so nothing fails.
      using measured = reserveStep({ model, tokens: 2048, ramLimit: Math.floor(live + need * 0.6) });
      expect(measured.attempts).toEqual([]);
    } finally {
      setRamLimit(null);
    }
  });

  it('gives up only where the least plan fails, and then names a length that can be had', async () => {
    using model = await adapted('gpt-oss');
    const live = deviceMemory('cpu').liveBytes + deviceMemory('host').liveBytes;
    const plenty = { vram: 2 ** 34, ram: 2 ** 34 };
    let [no, yes] = [2 ** 20, 2 ** 32];
    while (yes - no > 2 ** 16) {
      const bytes = (no + yes) / 2;
      if (planStep({ model, tokens: 2048, budgets: { vram: bytes, ram: bytes } }).fits) yes = bytes;
      else no = bytes;
    }
    try {
      using least = reserveStep({ model, tokens: 2048, budgets: plenty, ramLimit: Math.ceil(live + yes * 1.05) });
      expect(least.attempts.length).toBeGreaterThan(1);
      least.dispose();
      let message = '';
      try {
        reserveStep({ model, tokens: 2048, budgets: plenty, ramLimit: Math.floor(live + yes * 0.8) });
      } catch (error) {
        expect(error).toMatchObject({ code: expect.stringMatching(/ERR_LC_(PLAN|OUT_OF_MEMORY)/) });
        ({ message } = error as Error);
      }
      const fits = Number(/longest length that fits: (\d+)/.exec(message)?.[1]);
      expect(fits).toBeGreaterThan(1000);
      expect(fits).toBeLessThan(2048);
      reserveStep({ model, tokens: fits, budgets: plenty, ramLimit: Math.floor(live + yes * 0.8) }).dispose();
      // Someone else takes memory after the first look: measured again, the next plan fits at once.
      let looked = 0;
      const budgets = () => (looked++ === 0 ? plenty : { vram: yes * 1.05, ram: yes * 1.05 });
      using foiled = reserveStep({ model, tokens: 2048, budgets, ramLimit: Math.ceil(live + yes * 1.1) });
      expect(foiled.attempts.length).toBe(1);
    } finally {
      setRamLimit(null);
    }
  });

  it('plans smaller where the budget is small, and says what does not fit', async () => {
    using model = await adapted('gpt-oss');
    const at = (bytes: number, more = {}) => reserveStep({ model, tokens: 2048, budgets: { vram: bytes, ram: bytes }, ...more });
    using roomy = at(2 ** 32);
    const need = roomy.plan.predictedPeak.device + roomy.plan.predictedPeak.host;
    using tight = at(need * 0.5);
    expect(tight.plan.predictedPeak.device + tight.plan.predictedPeak.host).toBeLessThanOrEqual(need * 0.5);
    expect(tight.plan.tile).toBeLessThan(roomy.plan.tile);
    expect(() => at(1 << 20)).toThrow(
      expect.objectContaining({
        code: 'ERR_LC_PLAN',
        message: expect.stringMatching(/2048 tokens do not fit: RAM: .*longest length that fits: \d+/),
      }),
    );
  });
});
