/** Damaged models, tokenizers, data and adapters: each is refused with its typed error, frees what it took, and leaves what was written before. */
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type DatasetOptions, loadDataset, loadTokenizer, type PackedDataset } from '@lc/data';
import { expectNoLeaks } from '@lc/tensor/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { FastLanguageModel, type LanguageModel, type SFTConfig, SFTTrainer } from '../src/index.js';

expectNoLeaks();
const tiny = join(dirname(fileURLToPath(import.meta.url)), '../../../examples/quickstart/tiny-gpt-oss');
let dir: string;
let text: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), 'lc-bad-input-'));
  text = join(dir, 'good.txt');
  writeFileSync(text, 'The whale went to sea. A ship of men followed it in the cold. '.repeat(40));
});
afterAll(() => rmSync(dir, { recursive: true, force: true }));

interface Failure {
  code: string;
  message: string;
}
const failure = async (promise: Promise<unknown>): Promise<Failure> => {
  try {
    await promise;
  } catch (error) {
    return error as Failure;
  }
  throw new Error('expected a failure');
};
let copies = 0;
/** A copy of the model with one file replaced (undefined: deleted). */
function damaged(file: string, change: (content: Buffer) => string | Uint8Array | undefined): string {
  const folder = join(dir, `model-${copies++}`);
  cpSync(tiny, folder, { recursive: true });
  const content = change(readFileSync(join(folder, file)));
  if (content === undefined) rmSync(join(folder, file));
  else writeFileSync(join(folder, file), content);
  return folder;
}
const load = (folder: string, adapter?: string): Promise<Failure> =>
  failure(FastLanguageModel.fromPretrained(folder, { tile: 32, ...(adapter ? { adapter } : {}) }));

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}
/** Rewrites a safetensors file. Offsets stay relative to the data, so a changed header needs no other change. */
function rewrite(file: Uint8Array, change: (header: Record<string, Entry>, data: Uint8Array) => void): Uint8Array {
  const bytes = Buffer.from(file);
  const end = 8 + Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString('utf8', 8, end)) as Record<string, Entry>;
  const before = Buffer.from(bytes.subarray(end));
  change(header, before);
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  return Buffer.concat([length, json, before]);
}
const withLength = (file: Buffer, length: bigint): Buffer => {
  const out = Buffer.from(file);
  out.writeBigUInt64LE(length);
  return out;
};
const entry = (header: Record<string, Entry>, name: string): Entry => {
  const found = header[name];
  if (!found) throw new Error(`no ${name}: ${Object.keys(header).join(', ')}`);
  return found;
};
const alter =
  (name: string, change: Partial<Entry> | ((data: Uint8Array) => Partial<Entry>)) =>
  (file: Uint8Array): Uint8Array =>
    rewrite(file, (header, data) => Object.assign(entry(header, name), typeof change === 'function' ? change(data) : change));
/** Writes one value into a tensor of the file: the bytes of a NaN in its dtype. */
function putNan(header: Record<string, Entry>, data: Uint8Array, name: string, at: number): void {
  const { dtype, data_offsets } = entry(header, name);
  const view = new DataView(data.buffer, data.byteOffset + data_offsets[0]);
  if (dtype === 'BF16') view.setUint16(2 * at, 0x7fc0, true);
  else if (dtype === 'F32') view.setFloat32(4 * at, Number.NaN, true);
  else throw new Error(`no NaN for ${dtype}`);
}
const embed = 'model.embed_tokens.weight';
const norm = 'model.norm.weight';

describe('a damaged model', () => {
  const cases: [what: string, change: (file: Buffer) => Uint8Array, code: string, message: RegExp][] = [
    ['cut in its data', (f) => f.subarray(0, f.length >> 1), 'ERR_LC_SAFETENSORS', /truncated|only \d+ bytes/],
    ['cut by one byte', (f) => f.subarray(0, f.length - 1), 'ERR_LC_SAFETENSORS', /truncated|only \d+ bytes/],
    ['cut in its header', (f) => f.subarray(0, 200), 'ERR_LC_SAFETENSORS', /header/],
    ['cut in its length', (f) => f.subarray(0, 5), 'ERR_LC_SAFETENSORS', /model\.safetensors/],
    ['empty', () => new Uint8Array(), 'ERR_LC_SAFETENSORS', /model\.safetensors/],
    ['a page of HTML', () => Buffer.from(`<!doctype html>${' '.repeat(1000)}`), 'ERR_LC_SAFETENSORS', /header/],
    ['a header length beyond the file', (f) => withLength(f, BigInt(f.length) + 1n), 'ERR_LC_SAFETENSORS', /header/],
    ['a header length beyond all memory', (f) => withLength(f, 1n << 62n), 'ERR_LC_SAFETENSORS', /header/],
    ['a header length of 2^64 - 1', (f) => withLength(f, 0xffffffffffffffffn), 'ERR_LC_SAFETENSORS', /header/],
    ['a header cut short by its length', (f) => withLength(f, 100n), 'ERR_LC_SAFETENSORS', /not JSON/],
    [
      'overlapping tensors',
      (f) =>
        rewrite(f, (h) => {
          const [a, b] = ['model.layers.0.self_attn.k_proj.weight', 'model.layers.0.self_attn.v_proj.weight'].map((n) => entry(h, n));
          if (a && b) b.data_offsets = a.data_offsets;
        }),
      'ERR_LC_SAFETENSORS',
      /overlaps/,
    ],
    [
      'a tensor behind the end',
      alter(norm, (d) => ({ data_offsets: [d.length, d.length + 192 * 2] })),
      'ERR_LC_SAFETENSORS',
      /'model\.norm\.weight': ends at byte/,
    ],
    ['a shape that the bytes do not have', alter(embed, { shape: [1 << 20, 1 << 20] }), 'ERR_LC_SAFETENSORS', /needs \d+ bytes/],
    ['a shape that overflows', alter(embed, { shape: [2 ** 40, 2 ** 40] }), 'ERR_LC_SAFETENSORS', /overflows/],
    ['a negative size', alter(embed, { shape: [-1, -4] }), 'ERR_LC_SAFETENSORS', /whole numbers/],
    ['an unknown dtype', alter(embed, { dtype: 'BF17' }), 'ERR_LC_SAFETENSORS', /dtype must be one of/],
    ['bytes that belong to nothing', (f) => Buffer.concat([f, Buffer.alloc(64)]), 'ERR_LC_SAFETENSORS', /bytes of data/],
    [
      'a tensor of another shape than config.json says',
      (f) => rewrite(f, (h) => entry(h, embed).shape.reverse()),
      'ERR_LC_MODEL',
      /model\.embed_tokens\.weight/,
    ],
    [
      'a tensor under another name',
      (f) =>
        rewrite(f, (h) => {
          h['model.norm.wieght'] = entry(h, norm);
          delete h[norm];
        }),
      'ERR_LC_MODEL',
      /model\.norm\.weight[\s\S]*model\.norm\.wieght/,
    ],
    ['NaN in the embedding', (f) => rewrite(f, (h, d) => putNan(h, d, embed, 4321)), 'ERR_LC_NAN', /embed_tokens/],
    [
      'NaN in a quantized linear and in a norm',
      (f) =>
        rewrite(f, (h, d) => {
          putNan(h, d, 'model.layers.1.self_attn.q_proj.weight', 77);
          putNan(h, d, norm, 3);
        }),
      'ERR_LC_NAN',
      /model\.norm\.weight.*model\.layers\.1\.self_attn\.q_proj\.weight/,
    ],
  ];
  it.each(cases)('%s', async (_, change, code, message) => {
    const folder = damaged('model.safetensors', change);
    expect(await load(folder)).toMatchObject({ code, message: expect.stringMatching(message) });
    rmSync(folder, { recursive: true });
  });
});

describe('a broken config.json or tokenizer', () => {
  const json = (change: Record<string, unknown>) => (content: Buffer) => JSON.stringify({ ...JSON.parse(content.toString()), ...change });
  const cases: [what: string, file: string, change: (content: Buffer) => string | Uint8Array | undefined, code: string, message: RegExp][] =
    [
      ['no config', 'config.json', () => undefined, 'ERR_LC_IO', /config\.json/],
      ['half a config', 'config.json', (c) => c.subarray(0, c.length >> 1), 'ERR_LC_CONFIG', /config\.json.*JSON/],
      ['a list for a config', 'config.json', () => '[]', 'ERR_LC_CONFIG', /config\.json/],
      ['a text for a count', 'config.json', json({ hidden_size: 'wide' }), 'ERR_LC_CONFIG', /hidden_size/],
      ['a negative count', 'config.json', json({ num_hidden_layers: -1 }), 'ERR_LC_CONFIG', /num_hidden_layers/],
      ['a text for a number', 'config.json', json({ rms_norm_eps: 'small' }), 'ERR_LC_CONFIG', /rms_norm_eps/],
      ['heads that do not divide', 'config.json', json({ num_key_value_heads: 3 }), 'ERR_LC_CONFIG', /num_key_value_heads/],
      ['another width', 'config.json', json({ hidden_size: 256 }), 'ERR_LC_MODEL', /embed_tokens/],
      [
        'an unknown architecture',
        'config.json',
        json({ model_type: 'mamba', architectures: ['MambaForCausalLM'] }),
        'ERR_LC_MODEL',
        /mamba/i,
      ],
      ['no weights', 'model.safetensors', () => undefined, 'ERR_LC_IO', /model\.safetensors/],
      ['no tokenizer', 'tokenizer.json', () => undefined, 'ERR_LC_TOKENIZER', /tokenizer\.json/],
      ['half a tokenizer', 'tokenizer.json', (c) => c.subarray(0, c.length >> 1), 'ERR_LC_TOKENIZER', /not valid JSON/],
      ['a tokenizer of nothing', 'tokenizer.json', () => '{}', 'ERR_LC_TOKENIZER', /tokenizer\.json/],
      ['null for a tokenizer', 'tokenizer.json', () => 'null', 'ERR_LC_TOKENIZER', /tokenizer\.json/],
      ['a broken tokenizer config', 'tokenizer_config.json', () => '{"eos_token": ', 'ERR_LC_TOKENIZER', /tokenizer_config\.json/],
      [
        'a tokenizer with more tokens than the model',
        'tokenizer.json',
        (c) => {
          const parsed = JSON.parse(c.toString()) as { added_tokens: unknown[] };
          const added = { content: '<|beyond|>', single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
          parsed.added_tokens.push({ id: 5000, ...added });
          return JSON.stringify(parsed);
        },
        'ERR_LC_TOKENIZER',
        /do not belong together/,
      ],
    ];
  it.each(cases)('%s', async (_, file, change, code, message) => {
    const folder = damaged(file, change);
    expect(await load(folder)).toMatchObject({ code, message: expect.stringMatching(message) });
    rmSync(folder, { recursive: true });
  });
});

const data = (paths: string[], more: Partial<DatasetOptions> = {}, model = tiny): Promise<PackedDataset> =>
  loadDataset({ paths, tokenizer: loadTokenizer(model), maxLength: 64, excessLengthStrategy: 'split', onNotice: () => {}, ...more });

describe('bad data', () => {
  const cases: [what: string, name: string, content: string | Uint8Array, message: RegExp][] = [
    ['a text file without a byte', 'zero.txt', '', /zero\.txt/],
    ['a JSONL file without a byte', 'zero.jsonl', '', /zero\.jsonl/],
    ['a text file of blanks', 'blank.txt', ' \n\n ', /blank\.txt/],
    ['a JSONL file of empty lines', 'blank.jsonl', '\n\n\n', /blank\.jsonl/],
    ['half a line', 'half.jsonl', '{"text": "a whale of a text"}\n{"text": "cut o', /half\.jsonl:2/],
    ['a row that is not a sample', 'row.jsonl', '{"text": "a whale of a text"}\n\n{"prompt": 1}\n', /row\.jsonl:3/],
    ['an empty text', 'empty.jsonl', '{"text": ""}\n', /empty\.jsonl:1/],
    ['not UTF-8', 'latin.txt', Uint8Array.from([0x63, 0x61, 0x66, 0xe9, 0x20, 0x61]), /UTF-8/],
  ];
  it.each(cases)('%s', async (_, name, content, message) => {
    writeFileSync(join(dir, name), content);
    expect(await failure(data([join(dir, name)]))).toMatchObject({ code: 'ERR_LC_DATA', message: expect.stringMatching(message) });
    // One bad file among good ones is not skipped in silence.
    expect(await failure(data([text, join(dir, name)]))).toMatchObject({ code: 'ERR_LC_DATA' });
  });

  it('a chat template that never ends is stopped in time, and blocks nothing meanwhile', async () => {
    const chat = join(dir, 'chat.jsonl');
    writeFileSync(chat, `${JSON.stringify({ messages: [{ role: 'user', content: 'Call me Ishmael.' }] })}\n`);
    const model = damaged(
      'chat_template.jinja',
      () => '{% for a in range(1000000) %}{% for b in range(1000000) %}{% set c = a * b %}{% endfor %}{% endfor %}',
    );
    let ticks = 0;
    const timer = setInterval(() => ticks++, 20);
    const started = performance.now();
    const error = await failure(data([chat], { templateTimeout: 400 }, model));
    clearInterval(timer);
    expect(error).toMatchObject({ code: 'ERR_LC_TEMPLATE', message: expect.stringMatching(/chat\.jsonl:1: .*not done after 400 ms/) });
    expect(performance.now() - started).toBeLessThan(10_000);
    expect(ticks).toBeGreaterThan(3);
    for (const [template, message] of [
      ['{% for m in messages %}', /template/],
      ["{{ raise_exception('roles must alternate') }}", /roles must alternate/],
    ] as const) {
      const broken = await failure(data([chat], { chatTemplate: template }));
      expect(broken).toMatchObject({ code: 'ERR_LC_TEMPLATE', message: expect.stringMatching(message) });
    }
  });
});

/** Every file of a folder with its content, but for the log. */
function contents(folder: string): Map<string, string> {
  const files = readdirSync(folder, { recursive: true, encoding: 'utf8' }).filter((name) => statSync(join(folder, name)).isFile());
  return new Map(
    files
      .filter((name) => name !== 'metrics.jsonl')
      .sort()
      .map((name) => [name, readFileSync(join(folder, name)).toString('base64')]),
  );
}

describe('a run that goes wrong', () => {
  const args = (): SFTConfig => ({
    ...{ outputDir: join(dir, 'run'), maxSteps: 2, saveSteps: 1, learningRate: 1e-2, chunk: 32, lossChunk: 16, maxSeqLength: 64, seed: 1 },
  });
  async function withModel<T>(fn: (model: LanguageModel) => Promise<T>): Promise<T> {
    const { model } = await FastLanguageModel.fromPretrained(tiny, { tile: 32 });
    using m = FastLanguageModel.getPeftModel(model, { r: 4, targetModules: ['q_proj', 'v_proj'] });
    return await fn(m);
  }
  const train = async (trainDataset: PackedDataset, resumeFrom?: string, spoil?: (model: LanguageModel) => void): Promise<unknown> =>
    withModel(async (model) => {
      spoil?.(model);
      using trainer = new SFTTrainer({ model, trainDataset, args: args() });
      return await trainer.train(resumeFrom ? { resumeFrom } : {});
    });
  const run = (): string => join(dir, 'run');
  let before: Map<string, string>;
  beforeAll(async () => {
    await train(await data([text]));
    before = contents(run());
    expect([...before.keys()]).toEqual(expect.arrayContaining(['adapter_model.safetensors', join('checkpoint-2', 'COMPLETE')]));
  });

  it('all labels ignored: ERR_LC_NOTHING_SUPERVISED, and the former run stays', async () => {
    const masked = await data([text], { mask: (ids) => new Int32Array(ids.length).fill(-100) });
    expect(await failure(train(masked))).toMatchObject({
      code: 'ERR_LC_NOTHING_SUPERVISED',
      message: expect.stringMatching(/ignored \(-100\)/),
    });
    expect(contents(run())).toEqual(before);
  });

  it('NaN in training: ERR_LC_NAN, and the former run stays', async () => {
    const nan = (model: LanguageModel): void => {
      const p = model.parameters.at(-1);
      if (p) p.value.data()[1] = Number.NaN;
    };
    expect(await failure(train(await data([text]), undefined, nan))).toMatchObject({
      code: 'ERR_LC_NAN',
      message: expect.stringMatching(/step 1/),
    });
    expect(contents(run())).toEqual(before);
  });

  it('other data than the checkpoint had: ERR_LC_DATA or ERR_LC_CONFIG, and the former run stays', async () => {
    const other = join(dir, 'other.txt');
    writeFileSync(other, readFileSync(text, 'utf8').replace('whale', 'squid'));
    const error = await failure(train(await data([other]), join(run(), 'checkpoint-1')));
    expect(error.code).toMatch(/^ERR_LC_(DATA|CONFIG)$/);
    expect(contents(run())).toEqual(before);
  });

  it('adapters that do not fit, or are damaged, are refused with all that is wrong', async () => {
    const weights = 'adapter_model.safetensors';
    const adapter = (file: string, change: (content: Buffer) => string | Uint8Array | undefined): string => {
      const folder = join(dir, `adapter-${copies++}`);
      cpSync(run(), folder, { recursive: true });
      const content = change(readFileSync(join(folder, file)));
      if (content === undefined) rmSync(join(folder, file));
      else writeFileSync(join(folder, file), content);
      return folder;
    };
    const first = (h: Record<string, Entry>): string => Object.keys(h).find((n) => n !== '__metadata__') as string;
    const config = (change: Record<string, unknown>) => (c: Buffer) => JSON.stringify({ ...JSON.parse(c.toString()), ...change });
    const cases: [folder: string, code: string, message: RegExp][] = [
      [adapter(weights, (f) => rewrite(f, (h) => entry(h, first(h)).shape.reverse())), 'ERR_LC_ADAPTER', /the model has \[/],
      [adapter(weights, (f) => rewrite(f, (h, d) => putNan(h, d, first(h), 0))), 'ERR_LC_ADAPTER', /NaN/],
      [adapter(weights, (f) => f.subarray(0, f.length - 10)), 'ERR_LC_SAFETENSORS', /truncated|only \d+ bytes/],
      [adapter(weights, () => undefined), 'ERR_LC_IO', /adapter_model\.safetensors/],
      [adapter('adapter_config.json', config({ r: 8 })), 'ERR_LC_ADAPTER', /the model has \[8,192\]/],
      [adapter('adapter_config.json', config({ r: -1 })), 'ERR_LC_ADAPTER', /\br\b/],
      [adapter('adapter_config.json', config({ target_modules: ['q_proj'] })), 'ERR_LC_ADAPTER', /belongs to no module/],
      [adapter('adapter_config.json', config({ target_modules: ['nothing'] })), 'ERR_LC_ADAPTER', /match nothing/],
      [adapter('adapter_config.json', config({ peft_type: 'LOHA' })), 'ERR_LC_ADAPTER', /LOHA/],
      [adapter('adapter_config.json', config({ use_dora: true })), 'ERR_LC_ADAPTER', /dora/i],
      [adapter('adapter_config.json', () => '{'), 'ERR_LC_ADAPTER', /JSON/],
      [adapter('adapter_config.json', () => undefined), 'ERR_LC_ADAPTER', /no adapter_config\.json/],
    ];
    for (const [folder, code, message] of cases) {
      expect(await load(tiny, folder)).toMatchObject({ code, message: expect.stringMatching(message) });
    }
    // The one that was copied is whole.
    const { model } = await FastLanguageModel.fromPretrained(tiny, { tile: 32, adapter: run() });
    model.dispose();
  });
});
