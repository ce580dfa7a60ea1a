import { existsSync, readdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { parseModelConfig, readModelConfig } from '../src/index.js';

const fixtures = fileURLToPath(new URL('../../../test/fixtures/reference-models/', import.meta.url));
const llama = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  hidden_size: 64,
  intermediate_size: 96,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  vocab_size: 512,
};
const failure = (json: unknown): { code?: string; message: string } => {
  try {
    parseModelConfig(json);
  } catch (error) {
    return error as { code?: string; message: string };
  }
  throw new Error('no error');
};

describe('parseModelConfig', () => {
  it('bounds sizes before it makes anything from them', () => {
    const { raw } = readModelConfig(`${fixtures}llama`);
    for (const [key, value] of [
      ['num_hidden_layers', 1e15],
      ['num_hidden_layers', 100_000],
      ['vocab_size', 2 ** 40],
    ] as const) {
      expect(() => parseModelConfig({ ...raw, [key]: value })).toThrow(
        expect.objectContaining({ code: expect.stringMatching(/^ERR_LC_/), message: expect.stringContaining(key) }),
      );
    }
  });

  it('reads every reference model', () => {
    const folders = readdirSync(fixtures).filter((name) => existsSync(`${fixtures}${name}/config.json`));
    expect(folders).toHaveLength(12);
    for (const folder of folders) {
      const config = readModelConfig(`${fixtures}${folder}`);
      expect(config.layers, folder).toHaveLength(config.numHiddenLayers);
    }
  });

  it('knows what differs between the architectures', () => {
    const gptOss = readModelConfig(`${fixtures}gpt-oss`);
    expect(gptOss).toMatchObject({
      qkvBias: true,
      outBias: true,
      qkNorm: false,
      sinks: true,
      quantization: null,
      headDim: 32,
      tieWordEmbeddings: false,
    });
    expect(gptOss.layers.map((layer) => layer.window)).toEqual([16, null, 16, null]);
    expect(gptOss.moe).toEqual({
      kind: 'gpt_oss',
      numExperts: 8,
      numExpertsPerTok: 4,
      intermediateSize: 96,
      normTopkProb: true,
      swigluLimit: 7,
    });
    expect(gptOss.rope).toMatchObject({ ropeType: 'yarn', factor: 32, truncate: false, ropeTheta: 150000 });
    expect(readModelConfig(`${fixtures}qwen2`)).toMatchObject({
      qkvBias: true,
      outBias: false,
      headDim: 16,
      rope: { ropeType: 'default', ropeTheta: 1e6 },
    });
    expect(readModelConfig(`${fixtures}qwen3`)).toMatchObject({ qkvBias: false, qkNorm: true, headDim: 64 });
    expect(readModelConfig(`${fixtures}qwen3-moe`).moe).toMatchObject({
      kind: 'qwen3',
      numExperts: 8,
      normTopkProb: true,
      intermediateSize: 64,
    });
    expect(readModelConfig(`${fixtures}mistral-window`).layers.map((layer) => layer.window)).toEqual([11, 11]);
    expect(readModelConfig(`${fixtures}mistral`).layers.every((layer) => layer.window === null)).toBe(true);
  });

  it('reads rope_scaling with a top-level rope_theta as rope_parameters', () => {
    const scaling = { rope_type: 'llama3', factor: 8, high_freq_factor: 4, low_freq_factor: 1, original_max_position_embeddings: 64 };
    const old = parseModelConfig({ ...llama, rope_theta: 5e5, rope_scaling: scaling });
    const oldest = parseModelConfig({ ...llama, rope_theta: 5e5, rope_scaling: { ...scaling, rope_type: undefined, type: 'llama3' } });
    const now = parseModelConfig({ ...llama, rope_parameters: { ...scaling, rope_theta: 5e5 } });
    expect(old.rope).toEqual(now.rope);
    expect(oldest.rope).toEqual(now.rope);
    expect(now.rope).toMatchObject({ ropeType: 'llama3', ropeTheta: 5e5, factor: 8 });
    expect(parseModelConfig(llama).rope).toMatchObject({ ropeType: 'default', ropeTheta: 10000 });
    expect(parseModelConfig({ ...llama, rope_theta: 7, rope_scaling: null }).rope).toMatchObject({ ropeType: 'default', ropeTheta: 7 });
  });

  it('overrides the scaling and keeps what the override does not name', () => {
    const read = (ropeScaling: Record<string, unknown>) => readModelConfig(`${fixtures}gpt-oss`, { ropeScaling }).rope;
    expect(read({ rope_type: 'yarn', factor: 8 })).toMatchObject({
      ropeType: 'yarn',
      factor: 8,
      truncate: false,
      originalMaxPositionEmbeddings: 4096,
      ropeTheta: 150000,
    });
    expect(read({ factor: 64 })).toMatchObject({ ropeType: 'yarn', factor: 64 });
    const linear = read({ rope_type: 'linear', factor: 2 });
    expect(linear).toMatchObject({ ropeType: 'linear', factor: 2, ropeTheta: 150000 });
    expect(linear.truncate).toBeUndefined();
  });

  it('fills in the defaults of transformers', () => {
    const config = parseModelConfig(llama);
    expect(config).toMatchObject({
      numKeyValueHeads: 4,
      headDim: 16,
      rmsNormEps: 1e-6,
      tieWordEmbeddings: false,
      qkvBias: false,
      mlpBias: false,
    });
    const qwen2 = { ...llama, architectures: ['Qwen2ForCausalLM'], model_type: 'qwen2', num_key_value_heads: 2 };
    expect(
      parseModelConfig({ ...qwen2, sliding_window: 8, use_sliding_window: true, max_window_layers: 1 }).layers.map((l) => l.window),
    ).toEqual([null, 8]);
    expect(parseModelConfig({ ...qwen2, sliding_window: 8 }).layers.map((l) => l.window)).toEqual([null, null]);
    const moe = {
      ...llama,
      architectures: ['Qwen3MoeForCausalLM'],
      model_type: 'qwen3_moe',
      num_key_value_heads: 2,
      num_experts: 4,
      num_experts_per_tok: 2,
      mlp_only_layers: [0],
    };
    expect(parseModelConfig(moe).layers.map((l) => l.mlp)).toEqual(['dense', 'moe']);
    expect(parseModelConfig(moe).moe).toMatchObject({ numExperts: 4, normTopkProb: false });
    const mistral = { ...llama, architectures: ['MistralForCausalLM'], model_type: 'mistral', num_key_value_heads: 2 };
    expect(parseModelConfig(mistral).layers[0]?.window).toBe(4096);
    const gptOss = { ...llama, architectures: ['GptOssForCausalLM'], model_type: 'gpt_oss', num_key_value_heads: 2, num_local_experts: 4 };
    expect(parseModelConfig(gptOss).layers.map((l) => l.window)).toEqual([128, null]);
    expect(
      parseModelConfig({ ...gptOss, quantization_config: { quant_method: 'mxfp4', modules_to_not_convert: ['lm_head'] } }).quantization,
    ).toBe('mxfp4');
  });

  it('lists every wrong field at once', () => {
    const { code, message } = failure({
      ...llama,
      hidden_size: 'big',
      num_attention_heads: 6,
      num_key_value_heads: 4,
      hidden_act: 'relu',
      layer_types: ['full_attention', 'chunked_attention', 'full_attention'],
      rope_parameters: { rope_type: 'longrope' },
      quantization_config: { quant_method: 'gptq' },
      vocab_size: undefined,
    });
    expect(code).toBe('ERR_LC_CONFIG');
    for (const part of [
      'hidden_size',
      'num_key_value_heads',
      'hidden_act',
      'chunked_attention',
      'layer_types: expected 2',
      'longrope',
      'gptq',
      'vocab_size: expected a whole number, got nothing',
    ]) {
      expect(message).toContain(part);
    }
  });

  it('refuses what it does not know', () => {
    expect(failure({ ...llama, architectures: ['MambaForCausalLM'] })).toMatchObject({
      code: 'ERR_LC_MODEL',
      message: expect.stringContaining('GptOssForCausalLM'),
    });
    expect(failure({ hidden_size: 3 })).toMatchObject({ code: 'ERR_LC_MODEL' });
    expect(failure({ ...llama, model_type: 'mistral' })).toMatchObject({ code: 'ERR_LC_CONFIG' });
    expect(failure([])).toMatchObject({ code: 'ERR_LC_CONFIG' });
    expect(failure({ ...llama, rope_parameters: { rope_type: 'yarn', factor: 'x' } })).toMatchObject({ code: 'ERR_LC_CONFIG' });
    expect(failure({ ...llama, rope_scaling: { rope_type: 'linear' } }).message).toContain('factor');
    expect(() => readModelConfig('/nonexistent')).toThrow(expect.objectContaining({ code: 'ERR_LC_IO' }));
  });
});
