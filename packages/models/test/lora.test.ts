import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Parameter, Workspace } from '@lc/tensor';
import { expectNoLeaks, relativeError, seededRandom } from '@lc/tensor/testing';
import { describe, expect, it } from 'vitest';
import { attachLora, type CausalLM, loadAdapterOnto, loadModel, saveAdapterOf, TrainingSession } from '../src/index.js';
import { fixtures, logitsOf, someIds, temporaryFolder } from './helpers.js';

expectNoLeaks();

const ids = someIds(40);
const scramble = (parameters: readonly Parameter[]): void => {
  const random = seededRandom(5);
  for (const p of parameters) p.value.data().set(Float32Array.from({ length: p.value.numel }, () => (random() - 0.5) * 0.2));
};
const code = (fn: () => unknown): { code: string; message: string } => {
  try {
    fn();
  } catch (error) {
    return error as { code: string; message: string };
  }
  throw new Error('no error');
};

describe('attachLora', () => {
  it('names parameters as PEFT does, and changes nothing at first', async () => {
    using model = await loadModel(`${fixtures}llama`);
    const base = await logitsOf(model, ids);
    const parameters = attachLora(model, { r: 4, loraAlpha: 8 });
    expect(parameters).toHaveLength(3 * 7 * 2);
    const shapes = Object.fromEntries(parameters.map((p) => [p.name, p.value.shape]));
    expect(shapes['base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight']).toEqual([4, 128]);
    expect(shapes['base_model.model.model.layers.2.mlp.down_proj.lora_B.weight']).toEqual([128, 4]);
    expect(await logitsOf(model, ids)).toEqual(base);
    scramble(parameters);
    expect(await logitsOf(model, ids)).not.toEqual(base);
    expect(code(() => attachLora(model, { r: 4 }))).toMatchObject({ code: 'ERR_LC_ADAPTER', message: expect.stringContaining('already') });
  });

  it('selects by name, by the end of a path, and all', async () => {
    const kinds = (model: CausalLM): string[] => [
      ...new Set(model.parameters.map((p) => p.name.replace(/^.*layers\.\d+\.|\.lora_[AB]\.weight$/g, ''))),
    ];
    const attached = async (name: string, config: Parameters<typeof attachLora>[1]): Promise<string[]> => {
      using model = await loadModel(fixtures + name, { lora: config });
      return kinds(model);
    };
    expect(await attached('llama', { r: 2, targetModules: ['self_attn.v_proj', 'up_proj'] })).toEqual(['self_attn.v_proj', 'mlp.up_proj']);
    expect(await attached('llama', { r: 2, targetModules: 'all-linear' })).toHaveLength(7);
    expect(await attached('gpt-oss', { r: 2 })).toEqual(['q', 'k', 'v', 'o'].map((key) => `self_attn.${key}_proj`));
    const both = { r: 2, targetModules: ['q_proj'], targetParameters: ['mlp.experts.down_proj', 'mlp.experts.gate_up_proj'] };
    expect(await attached('gpt-oss', both)).toEqual(['self_attn.q_proj', 'mlp.experts.base_layer', 'mlp.experts']);
    expect(await attached('gpt-oss', { r: 2, targetModules: [], targetParameters: ['gate_up_proj'] })).toEqual(['mlp.experts']);
  });

  it('refuses a target that matches nothing, and lists what there is', async () => {
    using model = await loadModel(`${fixtures}gpt-oss`);
    const modules = code(() => attachLora(model, { r: 4, targetModules: ['q_proj', 'gate_proj', 'proj'] }));
    expect(modules.code).toBe('ERR_LC_ADAPTER');
    for (const part of ["'gate_proj', 'proj'", 'self_attn.q_proj', 'self_attn.o_proj', 'targetParameters'])
      expect(modules.message).toContain(part);
    const parameters = code(() => attachLora(model, { r: 4, targetParameters: ['mlp.experts.up_proj'] }));
    expect(parameters).toMatchObject({
      code: 'ERR_LC_ADAPTER',
      message: expect.stringContaining('mlp.experts.gate_up_proj, mlp.experts.down_proj'),
    });
    expect(code(() => attachLora(model, { r: 4, loraDropout: 0.1, targetParameters: ['mlp.experts.down_proj'] })).code).toBe(
      'ERR_LC_ARGUMENT',
    );
    expect(model.parameters).toHaveLength(0); // a failed attach leaves the base as it was
    using dense = await loadModel(`${fixtures}llama`);
    expect(code(() => attachLora(dense, { r: 4, targetParameters: ['mlp.experts.down_proj'] })).message).toContain('no fused experts');
  });

  it('saves a PEFT folder that loads as the same model', async () => {
    const folder = temporaryFolder();
    using model = await loadModel(`${fixtures}gpt-oss`, {
      lora: { r: 3, loraAlpha: 5, useRslora: true, targetModules: 'all-linear', targetParameters: ['mlp.experts.gate_up_proj'] },
    });
    scramble(model.parameters);
    const want = await logitsOf(model, ids);
    await saveAdapterOf(model, folder, { baseModelNameOrPath: 'openai/gpt-oss' });
    expect(JSON.parse(readFileSync(join(folder, 'adapter_config.json'), 'utf8'))).toMatchObject({
      r: 3,
      lora_alpha: 5,
      use_rslora: true,
      target_modules: ['q_proj', 'k_proj', 'v_proj', 'o_proj'],
      target_parameters: ['mlp.experts.gate_up_proj'],
      base_model_name_or_path: 'openai/gpt-oss',
    });
    using again = await loadModel(`${fixtures}gpt-oss`);
    await loadAdapterOnto(again, folder);
    expect(await logitsOf(again, ids)).toEqual(want);
    await loadAdapterOnto(again, folder); // takes the values over
    using other = await loadModel(`${fixtures}llama`);
    await expect(loadAdapterOnto(other, folder)).rejects.toMatchObject({ code: 'ERR_LC_ADAPTER' });
    await expect(saveAdapterOf(other, folder)).rejects.toMatchObject({ code: 'ERR_LC_ADAPTER' });
  });

  it('drops out the same whatever the chunks', async () => {
    const run = async (chunk: number): Promise<Float32Array[]> => {
      using model = await loadModel(`${fixtures}llama-linear`, { lora: { r: 4, loraDropout: 0.3, seed: 2 } });
      scramble(model.parameters);
      using ws = new Workspace();
      using session = new TrainingSession({ model, tokens: 40, chunk, ws, verifyRecompute: true });
      await session.step({ inputIds: Int32Array.from(ids), labels: Int32Array.from(ids) }, { dropoutSeed: 11 });
      return model.parameters.map((p) => p.grad.data().slice());
    };
    const [whole, parts] = [await run(40), await run(7)];
    for (const [i, grad] of whole.entries()) {
      expect(relativeError(grad, parts[i] as Float32Array)).toBeLessThan(1e-5);
    }
  });
});
