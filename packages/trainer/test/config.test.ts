import { describe, expect, it } from 'vitest';
import { learningRateAt, parseConfig } from '../src/index.js';
import { editDistance, suggest } from '../src/suggest.js';

const base = 'base_model: ./model\ndatasets:\n  - path: a.txt\n';
const failure = (text: string, sets: string[] = []): { code: string; message: string } => {
  try {
    parseConfig(text, 'c.yaml', sets);
  } catch (error) {
    return error as { code: string; message: string };
  }
  throw new Error('expected a failure');
};

describe('config', () => {
  it('fills in defaults and reads numbers as axolotl users write them', () => {
    const c = parseConfig(`${base}learning_rate: 1e-4\nlora_r: 8\n`, 'c.yaml');
    expect(c).toMatchObject({ learning_rate: 1e-4, lora_r: 8, adapter: 'qlora', excess_length_strategy: 'raise', lr_scheduler: 'cosine' });
    expect(c.deterministic).toBe(true);
    expect(parseConfig(`${base}deterministic: false\n`, 'c.yaml').deterministic).toBe(false);
  });

  it.each([
    ['an unknown key', `${base}leraning_rate: 1e-4\n`, /c\.yaml:4: unknown key 'leraning_rate'; did you mean 'learning_rate'\?/],
    ['an unknown key far from any', `${base}zzzzzz: 1\n`, /c\.yaml:4: unknown key 'zzzzzz'$/],
    [
      'an unknown key of a dataset',
      'base_model: m\ndatasets:\n  - path: a\n    tpye: text\n',
      /c\.yaml:4: unknown key 'datasets\.0\.tpye'; did you mean 'type'/,
    ],
    ['a wrong type', `${base}lora_r: many\n`, /c\.yaml:4: lora_r:/],
    ['out of range', `${base}lora_dropout: 1.5\n`, /c\.yaml:4: lora_dropout:/],
    ['a missing key', 'datasets:\n  - path: a\n', /c\.yaml:1: base_model:/],
    ['broken YAML', 'a: [1,\nb: 2', /c\.yaml:\d+: not valid YAML/],
    ['a duplicate key', `${base}seed: 1\nseed: 2\n`, /c\.yaml:5: not valid YAML/],
    ['no mapping', '- 1\n', /expected a mapping/],
    ['nothing', '', /expected a mapping/],
    ['a contradiction', `${base}adapter: qlora\nload_in_4bit: false\n`, /c\.yaml:5: load_in_4bit: false contradicts/],
    ['warm-up twice', `${base}warmup_steps: 3\nwarmup_ratio: 0.1\n`, /c\.yaml:5: warmup_ratio/],
    ['evaluation of nothing', `${base}eval_steps: 3\n`, /nothing to evaluate on/],
  ])('%s is an error with its line', (_, text, message) => {
    const error = failure(text);
    expect(error.code).toBe('ERR_LC_CONFIG');
    expect(error.message).toMatch(message);
  });

  it('reports all problems at once, in order of lines', () => {
    const { message } = failure(`${base}lora_r: -1\nsede: 3\nlearning_rate: fast\n`);
    expect(message.split('\n').map((line) => line.slice(0, 8))).toEqual(['c.yaml:4', 'c.yaml:5', 'c.yaml:6']);
  });

  it('--set overrides, reaches inside, and is checked the same', () => {
    const c = parseConfig(base, 'c.yaml', [
      'learning_rate=3e-5',
      'datasets.0.path=b.jsonl',
      'lora_target_modules=[q_proj, v_proj]',
      'sample_packing=false',
    ]);
    expect(c).toMatchObject({ learning_rate: 3e-5, lora_target_modules: ['q_proj', 'v_proj'], sample_packing: false });
    expect(c.datasets[0]?.path).toBe('b.jsonl');
    expect(failure(base, ['lora_rank=3']).message).toMatch(/--set: unknown key 'lora_rank'/);
    expect(failure(base, ['seed']).message).toMatch(/expected key=value/);
    expect(failure(base, ['__proto__.x=1']).code).toBe('ERR_LC_CONFIG');
    expect(({} as { x?: number }).x).toBeUndefined();
  });

  it('limits are bytes, with or without a unit', () => {
    expect(parseConfig(base, 'c.yaml', ['vram_limit=24GiB', 'ram_limit=1000000', 'layers_per_segment=auto'])).toMatchObject({
      vram_limit: 24 * 2 ** 30,
      ram_limit: 1_000_000,
      layers_per_segment: 'auto',
    });
    for (const bad of ['lots', '-5', '0GiB', '[1]']) expect(failure(base, [`vram_limit=${bad}`]).message).toMatch(/vram_limit: /);
    expect(failure(base, ['vram_limit=lots']).message).toMatch(/expected bytes like 24GiB or 512MiB, got "lots"/);
  });

  it('an alias bomb is refused', () => {
    const bomb = `a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c,*c,*c,*c,*c]\n`;
    expect(failure(bomb).code).toBe('ERR_LC_CONFIG');
  });
});

describe('schedules', () => {
  // transformers.get_*_schedule_with_warmup at lr 1, 2 warm-up steps of 10.
  it.each([
    ['linear', [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]],
    ['cosine', [0, 0.5, ...Array.from({ length: 8 }, (_, i) => 0.5 * (1 + Math.cos((Math.PI * i) / 8)))]],
    ['constant', Array(10).fill(1)],
    ['constant_with_warmup', [0, 0.5, ...Array(8).fill(1)]],
  ] as const)('%s', (type, want) => {
    const got = Array.from({ length: 10 }, (_, step) => learningRateAt(step, { type, learningRate: 1, warmupSteps: 2, totalSteps: 10 }));
    got.forEach((lr, i) => expect(lr).toBeCloseTo(want[i] as number, 12));
  });
});

describe('suggestions', () => {
  it('finds typos and leaves strangers alone', () => {
    expect(editDistance('kitten', 'sitting')).toBe(3);
    expect(suggest('lora_alhpa', ['lora_alpha', 'lora_r'])).toBe('lora_alpha');
    expect(suggest('x', ['lora_alpha'])).toBeUndefined();
  });
});
