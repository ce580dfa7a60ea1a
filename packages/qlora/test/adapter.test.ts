import fs, { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { empty, fill, type Parameter, Scope } from '@lc/tensor';
import { openSafetensors, writeSafetensors } from '@lc/tensor/safetensors';
import { expectNoLeaks } from '@lc/tensor/testing';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';
import {
  type Adapter,
  applyAdapter,
  expertParameterName,
  loadAdapter,
  type PeftConfig,
  parsePeftConfig,
  saveAdapter,
} from '../src/index.js';

expectNoLeaks();
const fixture = (name: string): string => join(import.meta.dirname, 'fixtures', name);
let dir: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), 'lc-adapter-'));
});
afterAll(() => rmSync(dir, { recursive: true, force: true }));
afterEach(() => vi.restoreAllMocks());

const parametersOf = (scope: Scope, adapter: Adapter): Parameter[] =>
  [...adapter.tensors].map(([name, { shape }]) => {
    const value = scope.own(empty(shape));
    fill(value, 0);
    return { name, value, grad: value };
  });

describe('PEFT adapters', () => {
  it.each(['gpt-oss-expert-lora', 'qwen3-rslora'])('%s: what PEFT wrote goes in and comes out again, bit for bit', async (name) => {
    using scope = new Scope();
    const adapter = await loadAdapter(fixture(name));
    expect(adapter.config).toMatchObject({
      r: 4,
      loraAlpha: 8,
      loraDropout: 0,
      useRslora: name === 'qwen3-rslora',
      taskType: 'CAUSAL_LM',
      peftVersion: '0.21.0',
    });
    const parameters = parametersOf(scope, adapter);
    applyAdapter(parameters, adapter);
    const out = join(dir, name);
    await saveAdapter(out, { parameters, config: adapter.config });
    expect(readdirSync(out).sort()).toEqual(['README.md', 'adapter_config.json', 'adapter_model.safetensors']);

    using ours = await openSafetensors(join(out, 'adapter_model.safetensors'));
    using theirs = await openSafetensors(join(fixture(name), 'adapter_model.safetensors'));
    expect([...ours.names].sort()).toEqual([...theirs.names].sort());
    expect(ours.metadata).toEqual(theirs.metadata);
    for (const key of theirs.names) {
      expect(ours.info(key)).toMatchObject({ fileDtype: theirs.info(key).fileDtype, shape: theirs.info(key).shape });
      expect(await ours.read(key)).toEqual(await theirs.read(key));
    }
    // Every key that we write means the same there; those that only newer PEFT writes are off.
    const read = (folder: string): Record<string, unknown> =>
      JSON.parse(readFileSync(join(folder, 'adapter_config.json'), 'utf8')) as Record<string, unknown>;
    const { peft_version: _, init_lora_weights: __, ...mine } = read(out);
    expect(read(fixture(name))).toMatchObject(mine);
    expect((await loadAdapter(out)).config).toEqual({ ...adapter.config, peftVersion: '0.17.0' });
    expect(readFileSync(join(out, 'README.md'), 'utf8')).toContain('library_name: peft');
  });

  it('names fused experts as PEFT nests them', () => {
    const module = 'base_model.model.model.layers.0.mlp.experts';
    expect([0, 1].map((i) => expertParameterName(module, i, 2))).toEqual([`${module}.base_layer`, module]);
    expect(expertParameterName(module, 0, 1)).toBe(module);
  });

  it('reads adapters in bf16', async () => {
    const path = join(dir, 'half');
    cpSync(fixture('qwen3-rslora'), path, { recursive: true });
    await writeSafetensors(join(path, 'adapter_model.safetensors'), [
      { name: 'x.lora_A.weight', dtype: 'bf16', shape: [1, 2], data: Uint16Array.of(0x3f80, 0xc000) },
    ]);
    expect([...(await loadAdapter(path)).tensors.values()]).toEqual([{ shape: [1, 2], data: Float32Array.of(1, -2) }]);
    await writeSafetensors(join(path, 'adapter_model.safetensors'), [
      { name: 'x.lora_A.weight', dtype: 'i32', shape: [1], data: Int32Array.of(1) },
    ]);
    await expect(loadAdapter(path)).rejects.toMatchObject({
      code: 'ERR_LC_ADAPTER',
      message: expect.stringContaining("'x.lora_A.weight' is I32"),
    });
  });

  it('lists everything that does not fit, and changes nothing', async () => {
    using scope = new Scope();
    const adapter = await loadAdapter(fixture('qwen3-rslora'));
    const parameters = parametersOf(scope, adapter);
    const [first, second, third] = parameters as [Parameter, Parameter, Parameter];
    const tensors = new Map(adapter.tensors);
    tensors.delete(first.name);
    tensors.set(second.name, { shape: [1, 1], data: new Float32Array(1) });
    tensors.set(third.name, { shape: third.value.shape, data: new Float32Array(third.value.numel).fill(Number.NaN) });
    tensors.set('stranger', { shape: [1], data: new Float32Array(1) });
    const attempt = (): void => applyAdapter(parameters, { ...adapter, tensors });
    expect(attempt).toThrow(expect.objectContaining({ code: 'ERR_LC_ADAPTER' }));
    for (const text of [
      `'${first.name}' is missing`,
      `'${second.name}' is [1,1], the model has [`,
      `'${third.name}' holds NaN`,
      "'stranger' belongs to no module",
    ]) {
      expect(attempt).toThrow(text);
    }
    expect(parameters.every((p) => p.value.data().every((v) => v === 0))).toBe(true);
  });

  it.each<[string, Record<string, unknown>, RegExp]>([
    ['another method', { peft_type: 'IA3' }, /peft_type must be "LORA", is "IA3"/],
    ['DoRA', { use_dora: true }, /use_dora = true is not supported/],
    ['QALoRA', { use_qalora: true }, /use_qalora/],
    ['rank patterns', { rank_pattern: { q_proj: 8 } }, /rank_pattern = {"q_proj":8}/],
    ['alpha patterns', { alpha_pattern: { q_proj: 8 } }, /alpha_pattern/],
    ['saved modules', { modules_to_save: ['lm_head'] }, /modules_to_save/],
    ['biases', { bias: 'all' }, /bias must be "none"/],
    ['lora_bias', { lora_bias: true }, /lora_bias/],
    ['replicated layers', { layer_replication: [[0, 2]] }, /layer_replication/],
    ['an unknown option that is on', { brand_new: 3 }, /brand_new = 3/],
    ['r of 0 and several problems at once', { r: 0, use_dora: true, lora_alpha: 'x' }, /r must be.*lora_alpha must be.*use_dora/],
    ['bad lists', { target_modules: [1] }, /target_modules/],
    ['bad dropout', { lora_dropout: 1 }, /lora_dropout/],
  ])('refuses %s', (_, change, text) => {
    const base = JSON.parse(readFileSync(join(fixture('qwen3-rslora'), 'adapter_config.json'), 'utf8')) as Record<string, unknown>;
    const attempt = (): PeftConfig => parsePeftConfig(JSON.stringify({ ...base, ...change }), 'adapter_config.json');
    expect(attempt).toThrow(expect.objectContaining({ code: 'ERR_LC_ADAPTER' }));
    expect(attempt).toThrow(text);
  });

  it('refuses broken JSON and folders without an adapter', async () => {
    for (const text of ['{', '[]', 'null', '3'])
      expect(() => parsePeftConfig(text, 'f')).toThrow(expect.objectContaining({ code: 'ERR_LC_ADAPTER' }));
    await expect(loadAdapter(join(dir, 'nowhere'))).rejects.toMatchObject({ code: 'ERR_LC_IO' });
  });

  it('a full disk loses nothing that was there', async () => {
    using scope = new Scope();
    const adapter = await loadAdapter(fixture('qwen3-rslora'));
    const parameters = parametersOf(scope, adapter);
    applyAdapter(parameters, adapter);
    const out = join(dir, 'full');
    await saveAdapter(out, { parameters, config: adapter.config });
    writeFileSync(join(out, 'README.md'), 'edited');
    const before = Object.fromEntries(readdirSync(out).map((f) => [f, readFileSync(join(out, f))]));
    for (const p of parameters) fill(p.value, 3);
    vi.spyOn(fs, 'write').mockImplementation(((...args: unknown[]) => {
      (args.at(-1) as (error: Error) => void)(Object.assign(new Error('ENOSPC: no space left on device, write'), { code: 'ENOSPC' }));
    }) as typeof fs.write);
    await expect(saveAdapter(out, { parameters, config: adapter.config })).rejects.toMatchObject({
      code: 'ERR_LC_IO',
      message: expect.stringContaining('no space left'),
    });
    vi.restoreAllMocks();
    expect(Object.fromEntries(readdirSync(out).map((f) => [f, readFileSync(join(out, f))]))).toEqual(before);
    await saveAdapter(out, { parameters, config: adapter.config });
    expect(readFileSync(join(out, 'README.md'), 'utf8')).toBe('edited');
  });
});
