import { describe, expect, it } from 'vitest';
import { modelShapeFromConfig, type PlanOptions, plan, probe } from '../src/index.js';

const gptOss20b = modelShapeFromConfig({
  num_hidden_layers: 24,
  hidden_size: 2880,
  num_attention_heads: 64,
  num_key_value_heads: 8,
  head_dim: 64,
  intermediate_size: 2880,
  num_local_experts: 32,
  num_experts_per_tok: 4,
  vocab_size: 201088,
});
const GiB = 2 ** 30;
const cuda = (tokens: number, more: Partial<PlanOptions> = {}) =>
  plan({ model: gptOss20b, tokens, device: 'cuda', vramBudget: 80 * GiB, ramBudget: 120 * GiB, ...more });

describe('plan', () => {
  it('gpt-oss-20b: bytes per token are what the schedule stores', () => {
    const p = cuda(131_072);
    expect(p.perToken.device).toBe(6144 + 5760 + 12); // K, V bf16 and dK, dV f32 of one layer; dx; ids, labels, documents
    expect(p.perToken.checkpoints).toBe(138_240);
    expect(p.fits).toBe(true);
  });

  it('device bytes grow by exactly that, with tiers and sizes fixed', () => {
    const at = (tokens: number) => cuda(tokens, { chunk: 4096, lossChunk: 512, checkpointDeviceBytes: 0 });
    const [a, b] = [at(65_536), at(131_072)];
    expect((b.predictedPeak.device - a.predictedPeak.device) / 65_536).toBe(a.perToken.device);
    expect((b.predictedPeak.host - a.predictedPeak.host) / 65_536).toBe(138_240);
  });

  it('half a million tokens fit 24 GiB of VRAM, with the checkpoints in RAM', () => {
    const p = cuda(530_000, { vramBudget: 24 * GiB });
    expect(p.fits).toBe(true);
    expect(p.predictedPeak.device).toBeLessThan(24 * GiB);
    expect((p.checkpoints.hostBytes + p.checkpoints.deviceBytes) / 1e9).toBeCloseTo(73.27, 1);
  });

  it('keeps the checkpoints on the device while there is room', () => {
    expect(cuda(32_768).checkpoints.hostBytes).toBe(0);
    expect(cuda(530_000).checkpoints.deviceBytes).toBeGreaterThan(0);
  });

  it('names the budget that is exceeded, and the longest length that fits', () => {
    const p = cuda(2_000_000);
    expect(p.fits).toBe(false);
    expect(p.reasons.join()).toMatch(/RAM: .* of gradient checkpoints, 120\.00 GiB to be had/);
    expect(p.maxTokens).toBeGreaterThan(900_000);
    expect(cuda(p.maxTokens).fits).toBe(true);
    expect(cuda(Math.ceil(p.maxTokens * 1.01)).fits).toBe(false);
    expect(cuda(1000, { vramBudget: GiB })).toMatchObject({ fits: false, maxTokens: 0 });
  });

  it('a checkpoint every second layer halves the host bytes', () => {
    const one = cuda(530_000, { vramBudget: 24 * GiB, checkpointDeviceBytes: 0 });
    const two = cuda(530_000, { vramBudget: 30 * GiB, checkpointDeviceBytes: 0, layersPerSegment: 2 });
    expect(two.predictedPeak.host).toBe(one.predictedPeak.host / 2);
  });

  it('plans for the CPU from what is free now', () => {
    const p = plan({ model: { ...gptOss20b, numHiddenLayers: 1, numExperts: 2, vocabSize: 1000 }, tokens: 2048 });
    expect([p.fits, p.chunk]).toEqual([true, 1024]);
    expect(p.maxTokens).toBeGreaterThan(2048);
  });

  it.each([{ tokens: 0 }, { tokens: 1.5 }, { chunk: 0 }, { vramBudget: Number.NaN }, { layersPerSegment: -1 }])('refuses %j', (bad) => {
    expect(() => cuda(1000, bad)).toThrow(expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }));
  });
});

describe('modelShapeFromConfig', () => {
  it('lists everything that is wrong', () => {
    expect(() => modelShapeFromConfig({ hidden_size: -1 })).toThrow(
      /hidden_size must be.*num_attention_heads is missing.*num_hidden_layers is missing/,
    );
    expect(() => modelShapeFromConfig(null)).toThrow(expect.objectContaining({ code: 'ERR_LC_CONFIG' }));
  });
});

describe('probe', () => {
  it('reports RAM, CPUs, and why there is no CUDA', () => {
    const p = probe();
    expect(p.ram.totalBytes).toBeGreaterThanOrEqual(p.ram.availableBytes);
    expect(p.cpus).toBeGreaterThan(0);
    if (!p.cuda.available) {
      expect(p.cuda.code).toMatch(/^ERR_LC_(NO_PREBUILD|NO_DRIVER|DRIVER_TOO_OLD|NO_DEVICE|NO_KERNEL_IMAGE)$/);
      expect(p.cuda.message.length).toBeGreaterThan(20);
      expect(p.gpus).toEqual([]);
    }
  });
});
