import { fromTypedArray } from '@lc/tensor';
import { expectNoLeaks, randomNormal, relativeError } from '@lc/tensor/testing';
import { describe, expect, test } from 'vitest';
import {
  parseRopeConfig,
  type RopeConfig,
  type RopeTable,
  reference,
  ropeBackward,
  ropeForward,
  ropeInit,
  yarnRange,
} from '../src/index.js';

expectNoLeaks();

const close = (got: ArrayLike<number>, want: ArrayLike<number>): void => expect(relativeError(got, want)).toBeLessThan(1e-14);
const init = (config: object, headDim: number, max: number, seqLen?: number): RopeTable =>
  ropeInit(parseRopeConfig(config as Record<string, unknown>), {
    headDim,
    maxPositionEmbeddings: max,
    ...(seqLen === undefined ? {} : { seqLen }),
  });

// The frequencies of theta 10,000 in 8 dims are exact decimal powers: 1, 1/10, 1/100, 1/1000.
const decades = [1, 0.1, 0.01, 0.001];

describe('frequencies', () => {
  test('default', () => {
    const rope = init({ rope_theta: 10000 }, 8, 64);
    close(rope.invFreq, decades);
    expect(rope).toMatchObject({ attentionFactor: 1, rotaryDim: 8 });
    close(init({}, 8, 64).invFreq, decades); // transformers' default base
  });

  test('linear: every angle divided by factor', () => {
    close(init({ rope_scaling: { type: 'linear', factor: 4 }, rope_theta: 10000 }, 8, 64).invFreq, [0.25, 0.025, 0.0025, 0.00025]);
  });

  test('dynamic: unchanged up to maxPositionEmbeddings, then a larger base', () => {
    const config = { rope_parameters: { rope_type: 'dynamic', factor: 2, rope_theta: 10000 } };
    for (const seqLen of [undefined, 1, 63, 64]) close(init(config, 8, 64, seqLen).invFreq, decades);
    // 96 of 64: (2 * 1.5 - 1)^(8/6) = 2^(4/3); its powers -j/4 for j = 0..3 are 2^0, 2^(-1/3), 2^(-2/3), 2^-1
    close(
      init(config, 8, 64, 96).invFreq,
      decades.map((f, j) => f * 2 ** (-j / 3)),
    );
  });

  test('llama3: kept, blended and divided dims', () => {
    // turns over 2,000 tokens: 318.3, 31.83, 3.183, 0.3183; kept above 4, divided by 8 below 1, (3.183 - 1) / 3 kept between
    const config = {
      rope_type: 'llama3',
      factor: 8,
      low_freq_factor: 1,
      high_freq_factor: 4,
      original_max_position_embeddings: 2000,
      rope_theta: 10000,
    };
    const kept = (10 / Math.PI - 1) / 3;
    close(init({ rope_parameters: config }, 8, 8192).invFreq, [1, 0.1, 0.01 * (kept + (1 - kept) / 8), 0.001 / 8]);
  });

  const gptOss = {
    rope_type: 'yarn',
    factor: 32,
    beta_fast: 32,
    beta_slow: 1,
    original_max_position_embeddings: 4096,
    rope_theta: 150000,
    truncate: false,
  };

  test('yarn: the ramp of gpt-oss (truncate false)', () => {
    const { low, high } = yarnRange(parseRopeConfig({ rope_parameters: gptOss }), 64, 4096);
    expect(low).toBeCloseTo(8.09, 2);
    expect(high).toBeCloseTo(17.4, 2);
    const rope = init({ rope_parameters: gptOss }, 64, 131072);
    expect(rope.attentionFactor).toBeCloseTo(0.1 * Math.log(32) + 1, 15);
    const plain = Array.from({ length: 32 }, (_, j) => Math.exp((-j / 32) * Math.log(150000)));
    // the bounds once more, from their meaning: the dim whose wavelength fits 32 times (once) into 4,096 tokens
    const bound = (turns: number): number => (32 * Math.log((4096 / (2 * Math.PI)) * (1 / turns))) / Math.log(150000);
    const want = plain.map((f, j) => {
      const ramp = j <= bound(32) ? 0 : j >= bound(1) ? 1 : (j - bound(32)) / (bound(1) - bound(32));
      return f * (1 - ramp) + (f / 32) * ramp;
    });
    close(rope.invFreq, want);
    close(rope.invFreq.subarray(0, 9), plain.slice(0, 9));
    close(
      rope.invFreq.subarray(18),
      plain.slice(18).map((f) => f / 32),
    );
  });

  test('yarn: truncate true (the default) rounds the bounds outwards', () => {
    const { truncate: _, ...config } = gptOss;
    expect(yarnRange(parseRopeConfig({ rope_parameters: config }), 64, 4096)).toEqual({ low: 8, high: 18 });
    const rope = init({ rope_parameters: config }, 64, 131072);
    const plain = 150000 ** (-13 / 32);
    expect(rope.invFreq[13]).toBeCloseTo(plain * 0.5 + (plain / 32) * 0.5, 15); // halfway from 8 to 18
  });

  test('yarn: attention factor, given or from mscale and mscale_all_dim', () => {
    const of = (more: object): number => init({ rope_parameters: { ...gptOss, ...more } }, 64, 131072).attentionFactor;
    expect(of({ attention_factor: 1.25 })).toBe(1.25);
    expect(of({ mscale: 0.7, mscale_all_dim: 0.5 })).toBeCloseTo((0.07 * Math.log(32) + 1) / (0.05 * Math.log(32) + 1), 15);
    expect(of({ mscale: 1, mscale_all_dim: 1 })).toBe(1);
    expect(of({ mscale: 0.7 })).toBeCloseTo(0.1 * Math.log(32) + 1, 15); // both are needed
    expect(of({ factor: 1 })).toBe(1);
  });

  test('yarn: factor from the lengths, original length from maxPositionEmbeddings, a range cut to the head', () => {
    const { factor: _f, ...noFactor } = gptOss;
    close(init({ rope_parameters: noFactor }, 64, 131072).invFreq, init({ rope_parameters: gptOss }, 64, 131072).invFreq);
    const { original_max_position_embeddings: _o, ...noOriginal } = gptOss;
    close(init({ rope_parameters: noOriginal }, 64, 4096).invFreq, init({ rope_parameters: gptOss }, 64, 4096).invFreq);
    // 4 tokens never turn once: both bounds are negative, so that every dim is divided
    const short = init({ rope_parameters: { rope_type: 'yarn', factor: 2, original_max_position_embeddings: 4, rope_theta: 10000 } }, 8, 8);
    close(
      short.invFreq.subarray(1),
      decades.slice(1).map((f) => f / 2),
    );
  });

  test('partial rotary: the first dims only, in either spelling', () => {
    for (const config of [{ partial_rotary_factor: 0.5 }, { rope_parameters: { partial_rotary_factor: 0.5, rope_theta: 10000 } }]) {
      const rope = init(config, 16, 64);
      expect(rope.rotaryDim).toBe(8);
      close(rope.invFreq, decades);
    }
  });
});

describe('config.json', () => {
  test('both spellings mean the same', () => {
    const now = {
      rope_parameters: { rope_type: 'yarn', factor: 4, original_max_position_embeddings: 64, rope_theta: 1e6, truncate: true },
    };
    const then = { rope_theta: 1e6, rope_scaling: { type: 'yarn', factor: 4, original_max_position_embeddings: 64, truncate: true } };
    expect(parseRopeConfig(then)).toEqual(parseRopeConfig(now));
    expect(parseRopeConfig({ rope_theta: 5, rope_scaling: null }).ropeType).toBe('default');
  });

  test('parameters per layer type', () => {
    const config = {
      rope_parameters: {
        full_attention: { rope_type: 'linear', factor: 8, rope_theta: 1e6 },
        sliding_attention: { rope_type: 'default', rope_theta: 1e4 },
      },
    };
    expect(parseRopeConfig(config, { layerType: 'full_attention' })).toMatchObject({ ropeType: 'linear', factor: 8, ropeTheta: 1e6 });
    expect(parseRopeConfig(config, { layerType: 'sliding_attention' })).toMatchObject({ ropeType: 'default', ropeTheta: 1e4 });
    expect(() => parseRopeConfig(config)).toThrow(/layerType/);
  });

  test.each<[object, RegExp]>([
    [{ rope_scaling: { type: 'longrope', factor: 4 } }, /unknown rope_type "longrope".*supported: default, linear, dynamic, yarn, llama3/],
    [{ rope_scaling: { type: 7 } }, /unknown rope_type 7/],
    [{ rope_scaling: 'linear' }, /must be an object or null/],
    [{ rope_parameters: { rope_type: 'linear', factor: 'two' } }, /factor must be a number, got "two"/],
    [{ rope_parameters: { rope_type: 'linear' } }, /linear needs factor/],
    [{ rope_parameters: { rope_type: 'linear', factor: 0.5 } }, /linear needs factor, a number of 1 or more, got 0.5/],
    [{ rope_parameters: { rope_type: 'llama3', factor: 8 } }, /llama3 needs lowFreqFactor/],
    [{ rope_parameters: { rope_type: 'yarn', factor: 8, truncate: 'no' } }, /truncate must be true or false/],
    [{ rope_parameters: { rope_type: 'dynamic', factor: 2, alpha: 1000 } }, /alpha/],
    [{ rope_theta: -1 }, /ropeTheta must be above 1/],
    [{ partial_rotary_factor: 0.2 }, /rotates 3 dims/],
    [{ partial_rotary_factor: 2 }, /rotates 32 dims/],
  ])('what cannot be right is ERR_LC_CONFIG: %j', (config, message) => {
    let error: unknown;
    try {
      init(config, 16, 64);
    } catch (e) {
      error = e;
    }
    expect(error).toMatchObject({ code: 'ERR_LC_CONFIG', message: expect.stringMatching(message) });
  });

  test('a kind that the types do not know', () => {
    const config = { ropeType: 'xpos', ropeTheta: 1e4 } as unknown as RopeConfig;
    expect(() => ropeInit(config, { headDim: 16, maxPositionEmbeddings: 64 })).toThrow(/unknown ropeType "xpos"/);
  });
});

describe('rotation', () => {
  const run = (
    x: Float32Array,
    shape: [number, number, number],
    rope: RopeTable,
    start: number,
    docs: Int32Array | null,
    back = false,
  ): Float32Array => {
    using t = fromTypedArray(Float32Array.from(x), shape);
    using d = docs ? fromTypedArray(docs, [shape[0]]) : null;
    (back ? ropeBackward : ropeForward)({ x: t, start, docStart: d, rope });
    return Float32Array.from(t.data() as Float32Array);
  };

  test('by hand: position 2, one pair of dims', () => {
    const rope = { invFreq: Float64Array.of(0.5), attentionFactor: 1, rotaryDim: 2 };
    const got = run(Float32Array.of(3, 4), [1, 1, 2], rope, 2, null);
    close(got, Float32Array.of(3 * Math.cos(1) - 4 * Math.sin(1), 4 * Math.cos(1) + 3 * Math.sin(1)));
  });

  test.each<[number, number, number, object]>([
    [1, 1, 16, {}],
    [7, 2, 64, { rope_scaling: { type: 'yarn', factor: 32, original_max_position_embeddings: 4096, truncate: false } }],
    [131, 3, 80, { partial_rotary_factor: 0.4 }],
    [131, 1, 6, {}],
  ])('agrees with the f64 reference: %i tokens, %i heads x %i, %j', (n, heads, headDim, config) => {
    const rope = init(config, headDim, 4096);
    const x = randomNormal(n * heads * headDim, 5);
    const docStart = Int32Array.from({ length: n }, (_, i) => (i < 3 ? 10 : 1002));
    for (const docs of [null, docStart]) {
      const problem = { x, n, heads, headDim, start: 1000, docStart: docs, rope };
      expect(relativeError(run(x, [n, heads, headDim], rope, 1000, docs), reference.ropeForward(problem))).toBeLessThan(2e-7);
      expect(relativeError(run(x, [n, heads, headDim], rope, 1000, docs, true), reference.ropeBackward(problem))).toBeLessThan(2e-7);
    }
  });

  test('dims that are not rotated are left alone, and backward undoes forward where attentionFactor is 1', () => {
    const rope = init({ partial_rotary_factor: 0.5 }, 32, 64);
    const x = randomNormal(50 * 2 * 32, 6);
    const turned = run(x, [50, 2, 32], rope, 12345, null);
    expect(turned[20]).toBe(x[20]);
    expect(relativeError(run(turned, [50, 2, 32], rope, 12345, null, true), x)).toBeLessThan(3e-7);
  });

  test('positions far beyond 2^19 are exact to f32 rounding', () => {
    // invFreq = pi / 2^k: position * invFreq is a fraction of pi that integers alone give
    for (const position of [524289, 16777217, 268435459, 1073741825]) {
      const pairs = 5;
      const rope = {
        invFreq: Float64Array.from({ length: pairs }, (_, j) => Math.PI / 2 ** (j + 1)),
        attentionFactor: 1,
        rotaryDim: 2 * pairs,
      };
      const x = new Float32Array(2 * pairs).fill(1, 0, pairs);
      const got = run(x, [1, 1, 2 * pairs], rope, position, null);
      for (let j = 0; j < pairs; j++) {
        const turn = (position % 2 ** (j + 2)) / 2 ** (j + 2); // of a full circle
        // Math.PI itself is off by 1.2e-16, and invFreq with it; the rest is half an ulp of f32 near 1
        const bound = 3.1e-8 + position * 2 ** -(j + 1) * 1.3e-16;
        expect(Math.abs((got[j] as number) - Math.cos(2 * Math.PI * turn)), `cos ${position} ${j}`).toBeLessThan(bound);
        expect(Math.abs((got[pairs + j] as number) - Math.sin(2 * Math.PI * turn)), `sin ${position} ${j}`).toBeLessThan(bound);
      }
    }
  });
});
