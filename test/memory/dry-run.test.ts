/**
 * The plan against the real sequence of allocations on CUDA, for models of real dimensions: what a step takes of the workspace is never more than planned, and not much
 * less; nor is what the device holds in all. Native code is replaced by `fake-native.ts`.
 */
import { attachLora, syntheticModel } from '@lc/models';
import { type ReserveOptions, reserveStep } from '@lc/trainer';
import { afterAll, describe, expect, it, vi } from 'vitest';
import { count, machine } from './fake-native.js';

vi.mock('../../packages/tensor/src/native.js', () => import('./fake-native.js'));

const attention = ['q_proj', 'k_proj', 'v_proj', 'o_proj'];
const experts = ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'];
const budgets = { vram: 2 ** 50, ram: 2 ** 50 };

interface Case {
  model: string;
  lora?: { targetModules?: string[] | 'all-linear'; targetParameters?: string[]; loraDropout?: number };
  loadIn4bit?: boolean;
  sizes: Partial<ReserveOptions> & { tokens: number };
}
const fixed = (tokens: number, chunk: number, tile: number, lossChunk: number, more: Partial<ReserveOptions> = {}): Case['sizes'] => ({
  ...{ tokens, chunk, tile, lossChunk, checkpointDeviceBytes: 0, keep: 0 },
  ...more,
});
const cases: Record<string, Case> = {
  'gpt-oss-20b, 32K': { model: 'gpt-oss-20b', sizes: fixed(32_768, 8192, 8192, 1024) },
  'gpt-oss-20b, 530K': { model: 'gpt-oss-20b', sizes: fixed(530_000, 16_384, 4096, 1300) },
  'gpt-oss-20b, outputs kept': { model: 'gpt-oss-20b', sizes: fixed(100_000, 8192, 2048, 1024, { keep: 1 }) },
  'gpt-oss-20b, last outputs kept': {
    model: 'gpt-oss-20b',
    sizes: fixed(100_000, 8192, 2048, 1024, { keep: { layers: 1, tokens: 40_000 }, layersPerSegment: 2 }),
  },
  'gpt-oss-20b, odd sizes, two layers a checkpoint': { model: 'gpt-oss-20b', sizes: fixed(10_007, 1531, 391, 77, { layersPerSegment: 2 }) },
  'gpt-oss-20b, one chunk, loss decides': { model: 'gpt-oss-20b', sizes: fixed(4096, 4096, 512, 4096) },
  'gpt-oss-20b, on experts': {
    model: 'gpt-oss-20b',
    lora: { targetModules: [], targetParameters: experts },
    sizes: fixed(32_768, 8192, 4096, 512),
  },
  'gpt-oss-20b, dropout': {
    model: 'gpt-oss-20b',
    lora: { targetModules: attention, loraDropout: 0.1 },
    sizes: fixed(32_768, 16_384, 512, 512),
  },
  'Llama-3.1-8B, all linears': { model: 'Llama-3.1-8B', lora: { targetModules: 'all-linear' }, sizes: fixed(65_536, 8192, 2048, 512) },
  'Llama-3.1-8B, dropout on all linears': {
    model: 'Llama-3.1-8B',
    lora: { targetModules: 'all-linear', loraDropout: 0.1 },
    sizes: fixed(16_384, 4096, 4096, 512),
  },
  'Llama-3.1-8B, bf16': { model: 'Llama-3.1-8B', loadIn4bit: false, sizes: fixed(65_536, 8192, 512, 128) },
  'Qwen3-30B-A3B': { model: 'Qwen3-30B-A3B', sizes: fixed(131_072, 16_384, 4096, 1024) },
  'Qwen2.5-3B': { model: 'Qwen2.5-3B', sizes: fixed(65_536, 4096, 1024, 256) },
};

const rows: string[] = [];
afterAll(() =>
  console.log(
    ['| case | workspace planned, MiB | taken | device in all, planned | taken |', '|---|---:|---:|---:|---:|', ...rows].join('\n'),
  ),
);

describe('a step takes what was planned', () => {
  it.each(Object.entries(cases))('%s', async (name, { model: preset, lora = { targetModules: attention }, loadIn4bit = true, sizes }) => {
    using model = await syntheticModel(preset, { layers: 2, device: 'cuda', loadIn4bit });
    attachLora(model, { r: 8, ...lora });
    const { live } = count('cuda:0');
    const warnings: string[] = [];
    using reserved = reserveStep({ model, budgets, ...sizes, onWarning: (message) => warnings.push(message) });
    const before = count('cuda:0').allocations;
    const inputIds = new Int32Array(sizes.tokens);
    // Every second label is ignored: then the loss gathers rows, which takes most.
    const labels = Int32Array.from(inputIds, (_, i) => (i % 2 ? 0 : -100));
    await reserved.session.step({ inputIds, labels }, { dropoutSeed: 1 });
    const dense = reserved.workspace.peakBytes;
    await reserved.session.step({ inputIds, labels: inputIds }, { dropoutSeed: 1 });
    const { plan, workspace } = reserved;
    const [taken, planned] = [Math.max(dense, workspace.peakBytes), plan.bytes.workspace];
    const all = count('cuda:0').live - live;
    const allPlanned = plan.predictedPeak.device - plan.bytes.context;
    const mib = (bytes: number): string => (bytes / 2 ** 20).toFixed(1);
    rows.push(`| ${name} | ${mib(planned)} | ${mib(taken)} | ${mib(allPlanned)} | ${mib(all)} |`);
    expect(count('cuda:0').allocations - before).toBe(0);
    expect(warnings).toEqual([]);
    expect(taken).toBeLessThanOrEqual(planned);
    expect(planned - taken).toBeLessThan(Math.max(0.03 * planned, 8 << 20));
    expect(all).toBeLessThanOrEqual(allPlanned);
    expect(allPlanned - all).toBeLessThan(Math.max(0.03 * allPlanned, 8 << 20));
    const host = count('host checkpoints').live + count('host kept').live;
    expect(plan.predictedPeak.host).toBe(host);
  });
});

describe('a million tokens of gpt-oss-20b, all 24 layers, on a card of 80 GB in a machine with 128 GiB', () => {
  const GiB = 2 ** 30;
  it.each([1, 'auto'] as const)('fit and take what was planned; layers per checkpoint: %s', async (layersPerSegment) => {
    using model = await syntheticModel('gpt-oss-20b', { device: 'cuda', loadIn4bit: true });
    attachLora(model, { r: 8, targetModules: attention });
    const tokens = 2 ** 20;
    const limits = { vram: 65 * GiB, ram: 112 * GiB }; // beside the weights, and less what others take
    const { live, allocations } = count('cuda:0');
    const warnings: string[] = [];
    const onWarning = (message: string): number => warnings.push(message);
    using reserved = reserveStep({ model, tokens, budgets: limits, layersPerSegment, onWarning });
    const { plan } = reserved;
    const reservations = count('cuda:0').allocations - allocations;
    const inputIds = new Int32Array(tokens);
    const { supervised } = await reserved.session.step({ inputIds, labels: inputIds });
    expect(supervised).toBe(tokens - 1);
    expect(count('cuda:0').allocations - allocations).toBe(reservations); // the step itself took nothing
    const taken = { device: count('cuda:0').live - live, host: count('host checkpoints').live + count('host kept').live };
    const planned = { device: plan.predictedPeak.device - plan.bytes.context, host: plan.predictedPeak.host };
    expect([warnings, reserved.attempts]).toEqual([[], []]);
    expect(reserved.workspace.peakBytes).toBeLessThanOrEqual(plan.bytes.workspace);
    expect(taken.host).toBe(planned.host);
    expect(taken.device).toBeLessThanOrEqual(planned.device);
    expect(planned.device - taken.device).toBeLessThan(0.01 * planned.device);
    expect(planned.device).toBeLessThan(limits.vram);
    expect(planned.host).toBeLessThan(limits.ram);
    const kept = `${plan.keep.layers} x ${plan.keep.tokens} tokens kept`;
    console.log(
      `${tokens} tokens: chunk ${plan.chunk}, tile ${plan.tile}, ${plan.segment} layers per checkpoint, ${kept}, ` +
        `${(taken.device / GiB).toFixed(2)} GiB beside the weights, ${(taken.host / GiB).toFixed(2)} GiB of host memory`,
    );
  });
});

describe('host memory that cannot be pinned', () => {
  const tokens = 32_768;
  const reserve = async (o: Partial<ReserveOptions>) => {
    using model = await syntheticModel('gpt-oss-20b', { layers: 4, device: 'cuda', loadIn4bit: true });
    attachLora(model, { r: 8, targetModules: attention });
    const warnings: string[] = [];
    using reserved = reserveStep({ model, tokens, budgets, onWarning: (message) => warnings.push(message), ...o });
    return { warnings, plan: reserved.plan, attempts: reserved.attempts };
  };

  it('is taken with one warning, or counts as a failed reservation', async () => {
    machine.pins = false;
    try {
      const { warnings, attempts } = await reserve({ checkpointDeviceBytes: 0 });
      expect(warnings).toEqual([expect.stringMatching(/GiB of host memory .* could not be pinned/)]);
      expect(attempts).toEqual([]);
      await expect(reserve({ checkpointDeviceBytes: 0, pinning: 'require' })).rejects.toMatchObject({
        code: 'ERR_LC_PLAN',
        message: expect.stringMatching(/do not fit: pinned ran out; .*longest length that fits: \d+/),
      });
      // Room for the checkpoints on the device, not for what could be kept: that goes to the host, and is given up.
      const onDevice = await reserve({ keep: 0 });
      expect(onDevice.plan.predictedPeak.host).toBe(0);
      const tight = { vram: onDevice.plan.predictedPeak.device + (300 << 20), ram: 2 ** 40 };
      expect((await reserve({ budgets: tight })).plan.predictedPeak.host).toBeGreaterThan(0);
      const required = await reserve({ budgets: tight, pinning: 'require' });
      expect(required.attempts.map(({ failed }) => failed)).toContain('pinned');
      expect(required.plan.predictedPeak.host).toBe(0);
    } finally {
      machine.pins = true;
    }
  });
});
