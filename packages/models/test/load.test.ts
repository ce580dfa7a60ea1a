import { cpSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Mxfp4Weight, Nf4Weight, type QuantizedExpertLinear, type QuantizedLinear } from '@lc/qlora';
import { copy, empty, fromTypedArray } from '@lc/tensor';
import { writeSafetensors } from '@lc/tensor/safetensors';
import { expectNoLeaks } from '@lc/tensor/testing';
import { describe, expect, it } from 'vitest';
import { transposeInto } from '../src/arrays.js';
import { loadModel } from '../src/index.js';
import { copyOf, entries, fixtures, logitsOf, readWeights, someIds, temporaryFolder, variant, type Weights } from './helpers.js';

expectNoLeaks();

const failure = async (promise: Promise<unknown>): Promise<{ code: string; message: string }> => {
  try {
    await promise;
  } catch (error) {
    return error as { code: string; message: string };
  }
  throw new Error('no error');
};
const get = (weights: Weights, name: string) => weights.get(name) as NonNullable<ReturnType<Weights['get']>>;
const ids = someIds(23);
const logits = async (folder: string, options: Parameters<typeof loadModel>[1] = {}): Promise<Float32Array> => {
  using model = await loadModel(folder, { tile: 16, ...options });
  return await logitsOf(model, ids, 9); // awaited here: `using` disposes on return
};
/** A bf16 or f32 tensor of a checkpoint as f32. */
function f32(weight: ReturnType<typeof get>): Float32Array {
  using from = fromTypedArray(weight.data, weight.shape, { dtype: weight.dtype });
  using to = empty(weight.shape);
  copy(to, from);
  return to.data().slice();
}

describe('loadModel', () => {
  it('lists every missing, extra and misshapen tensor', async () => {
    const folder = await variant('llama', (weights) => {
      weights.delete('model.norm.weight');
      weights.delete('model.layers.1.mlp.up_proj.weight');
      weights.set('model.layers.0.self_attn.q_proj.bias', { shape: [2], dtype: 'f32', data: new Float32Array(2) });
      const q = get(weights, 'model.layers.2.self_attn.q_proj.weight');
      weights.set('model.layers.2.self_attn.q_proj.weight', { ...q, shape: [q.shape[0] as number, 1, q.shape[1] as number] });
      weights.set('model.layers.2.self_attn.k_proj.weight', { shape: [64, 128], dtype: 'i32', data: new Int32Array(64 * 128) });
    });
    const { code, message } = await failure(loadModel(folder));
    expect(code).toBe('ERR_LC_MODEL');
    for (const part of [
      'missing (2)',
      'model.norm.weight [128]',
      'model.layers.1.mlp.up_proj.weight [256,128]',
      'not expected (1): model.layers.0.self_attn.q_proj.bias',
      'wrong shape or dtype (2)',
      'model.layers.2.self_attn.q_proj.weight is BF16 [128,1,128], expected BF16/F16/F32 [128,128]',
      'model.layers.2.self_attn.k_proj.weight is I32 [64,128]',
    ]) {
      expect(message).toContain(part);
    }
  });

  it('names every tensor with NaN or infinite values', async () => {
    const folder = await variant('llama', (weights) => {
      (get(weights, 'model.norm.weight').data as Uint16Array)[3] = 0x7fc0;
      (get(weights, 'model.layers.1.self_attn.o_proj.weight').data as Uint16Array)[5] = 0xff80;
    });
    for (const loadIn4bit of [false, true]) {
      const { code, message } = await failure(loadModel(folder, { loadIn4bit }));
      expect(code).toBe('ERR_LC_NAN');
      expect(message).toContain('model.norm.weight, model.layers.1.self_attn.o_proj.weight;');
    }
  });

  it('reads shards as one file', async () => {
    const folder = temporaryFolder();
    const weights = await readWeights(`${fixtures}llama`);
    const all = entries(weights);
    const weight_map: Record<string, string> = {};
    for (const [shard, part] of [all.slice(0, 9), all.slice(9)].entries()) {
      const file = `model-0000${shard + 1}-of-00002.safetensors`;
      await writeSafetensors(join(folder, file), part);
      for (const { name } of part) weight_map[name] = file;
    }
    writeFileSync(join(folder, 'model.safetensors.index.json'), JSON.stringify({ metadata: {}, weight_map }));
    cpSync(`${fixtures}llama/config.json`, join(folder, 'config.json'));
    expect(await logits(folder)).toEqual(await logits(`${fixtures}llama`));
  });

  it('takes a tied head that is the embedding, and refuses another', async () => {
    const tied = (add: number) =>
      variant('llama', (weights) => {
        const embed = get(weights, 'model.embed_tokens.weight');
        const data = (embed.data as Uint16Array).slice();
        data[0] = (data[0] as number) ^ add;
        weights.set('lm_head.weight', { ...embed, data });
      });
    expect(await logits(await tied(0))).toEqual(await logits(`${fixtures}llama`));
    expect(await failure(loadModel(await tied(1)))).toMatchObject({
      code: 'ERR_LC_MODEL',
      message: expect.stringContaining('tie_word_embeddings'),
    });
  });

  it('keeps weights in bf16 when asked to, with the same results', async () => {
    for (const name of ['llama', 'gpt-oss'])
      expect(await logits(fixtures + name, { dtype: 'bf16' })).toEqual(await logits(fixtures + name));
  });

  it('keeps the blocks of an MXFP4 checkpoint', async () => {
    const experts = ['gate_up_proj', 'down_proj'];
    const dense = copyOf('gpt-oss');
    const quantized = await variant(
      'gpt-oss',
      async (weights) => {
        const plain = new Map(weights);
        for (const name of [...weights.keys()].filter((key) => experts.some((e) => key.endsWith(`.experts.${e}`)))) {
          const [e, inner, outer] = get(weights, name).shape as [number, number, number];
          const values = f32(get(weights, name));
          using turned = empty([e, outer, inner]);
          for (let i = 0; i < e; i++)
            transposeInto(turned.rows(i, 1).data(), values.subarray(i * inner * outer, (i + 1) * inner * outer), inner, outer);
          using mx = Mxfp4Weight.quantize(turned);
          weights.delete(name);
          weights.set(`${name}_blocks`, { shape: mx.blocks.shape, dtype: 'u8', data: mx.blocks.data<Uint8Array>().slice() });
          weights.set(`${name}_scales`, { shape: mx.scales.shape, dtype: 'u8', data: mx.scales.data<Uint8Array>().slice() });
          mx.dequantize(turned);
          const back = new Float32Array(values.length);
          for (let i = 0; i < e; i++)
            transposeInto(back.subarray(i * inner * outer, (i + 1) * inner * outer), turned.rows(i, 1).data(), outer, inner);
          plain.set(name, { shape: [e, inner, outer], dtype: 'f32', data: back });
        }
        await writeSafetensors(join(dense, 'model.safetensors'), entries(plain));
      },
      { quantization_config: { quant_method: 'mxfp4', modules_to_not_convert: ['model.layers.*.self_attn', 'lm_head'] } },
    );
    const want = await logits(dense);
    expect(await logits(quantized)).toEqual(want);
    using model = await loadModel(quantized, { loadIn4bit: true });
    expect(model.expertModules.map((module) => (module.experts as QuantizedExpertLinear).weight.format)).toEqual(
      new Array(8).fill('mxfp4'),
    );
    expect(model.linearModules.map((module) => (module.linear as QuantizedLinear).weight.format)).toEqual(new Array(16).fill('nf4'));
    const { message } = await failure(loadModel(await variant('gpt-oss', () => {}, { quantization_config: { quant_method: 'mxfp4' } })));
    expect(message).toContain('gate_up_proj_blocks');
  });

  it('quantizes linears and experts to NF4: the model computes with their dequantized values', async () => {
    for (const name of ['llama', 'gpt-oss']) {
      using model = await loadModel(fixtures + name, { loadIn4bit: true, tile: 16 });
      const dequantized = (weight: { shape: readonly number[]; dequantize(out: ReturnType<typeof empty>): void }): Float32Array => {
        using out = empty(weight.shape);
        weight.dequantize(out);
        return out.data().slice();
      };
      const folder = await variant(name, (weights) => {
        for (const { name: key, linear } of model.linearModules) {
          const { weight } = linear as QuantizedLinear;
          expect(weight).toBeInstanceOf(Nf4Weight);
          weights.set(`${key}.weight`, { shape: weight.shape, dtype: 'f32', data: dequantized(weight) });
        }
        for (const { name: key, experts } of model.expertModules) {
          const { weight } = experts as QuantizedExpertLinear;
          const [e, outer, inner] = weight.shape as [number, number, number];
          const values = dequantized(weight);
          const data = new Float32Array(values.length);
          for (let i = 0; i < e; i++)
            transposeInto(
              data.subarray(i * inner * outer, (i + 1) * inner * outer),
              values.subarray(i * inner * outer, (i + 1) * inner * outer),
              outer,
              inner,
            );
          weights.set(key, { shape: [e, inner, outer], dtype: 'f32', data });
        }
      });
      expect(await logitsOf(model, ids, 9)).toEqual(await logits(folder));
    }
  });

  it('reads the fused experts of Qwen3-MoE as the separate ones', async () => {
    const folder = await variant('qwen3-moe', (weights) => {
      for (let layer = 0; layer < 3; layer++) {
        const prefix = `model.layers.${layer}.mlp.experts`;
        const stack = (parts: readonly string[]): Float32Array => {
          const all = Array.from({ length: 8 }, (_, e) => parts.map((part) => f32(get(weights, `${prefix}.${e}.${part}.weight`)))).flat();
          const out = new Float32Array(all.reduce((sum, part) => sum + part.length, 0));
          let at = 0;
          for (const part of all) {
            out.set(part, at);
            at += part.length;
          }
          return out;
        };
        const gateUp = stack(['gate_proj', 'up_proj']);
        const down = stack(['down_proj']);
        for (const key of [...weights.keys()]) if (key.startsWith(`${prefix}.`)) weights.delete(key);
        weights.set(`${prefix}.gate_up_proj`, { shape: [8, 128, 128], dtype: 'f32', data: gateUp });
        weights.set(`${prefix}.down_proj`, { shape: [8, 128, 64], dtype: 'f32', data: down });
      }
    });
    expect(await logits(folder)).toEqual(await logits(`${fixtures}qwen3-moe`));
  });

  it('asks for a scaling beyond the positions that RoPE covers', async () => {
    const { code, message } = await failure(loadModel(`${fixtures}llama`, { maxSeqLength: 10000 }));
    expect(code).toBe('ERR_LC_CONFIG');
    expect(message).toContain('ropeScaling');
    (await loadModel(`${fixtures}llama-dynamic`, { maxSeqLength: 10000 })).dispose();
    (await loadModel(`${fixtures}llama`, { maxSeqLength: 10000, ropeScaling: { rope_type: 'yarn', factor: 200 } })).dispose();
  });

  it('leaves nothing behind when it fails', async () => {
    const empty = join(temporaryFolder(), 'empty');
    mkdirSync(empty);
    expect(await failure(loadModel(empty))).toMatchObject({ code: 'ERR_LC_IO' });
    writeFileSync(join(empty, 'config.json'), '{ "architectures": [');
    expect(await failure(loadModel(empty))).toMatchObject({ code: 'ERR_LC_CONFIG' });
    expect(await failure(loadModel(`${fixtures}llama`, { lora: { r: 4, targetModules: ['nothing'] } }))).toMatchObject({
      code: 'ERR_LC_ADAPTER',
    });
  });
});
