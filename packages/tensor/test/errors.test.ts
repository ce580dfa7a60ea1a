import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { runInNewContext } from 'node:vm';
import { describe, expect, it } from 'vitest';
import { asLcError } from '../src/errors.js';
import { empty, fill, fromDLPack, gemm, LcError, LcTypeError, memInfo, setVramLimit, traceCalls, zeros } from '../src/index.js';
import { core } from '../src/native.js';
import { expectNoLeaks } from '../src/testing.js';
import { throwsTyped } from '../src/typed-addon.js';

expectNoLeaks();

function thrown(fn: () => unknown): unknown {
  try {
    fn();
  } catch (error) {
    return error;
  }
  return undefined;
}

describe('what native code throws', () => {
  it('is an LcError or an LcTypeError with its code, whatever the call', () => {
    using a = zeros([2, 3]);
    using gone = zeros([2, 2]);
    gone.dispose();
    for (const [call, type, code] of [
      [() => empty([2 ** 44], { dtype: 'u8' }), LcError, 'ERR_LC_OUT_OF_MEMORY'],
      [() => empty([-1]), LcTypeError, 'ERR_LC_SHAPE'],
      [() => fill(gone, 1), LcTypeError, 'ERR_LC_DISPOSED'],
      [() => fromDLPack({}), LcTypeError, 'ERR_LC_NOT_A_TENSOR'],
      [() => gemm({ a, b: gone, c: a }), LcTypeError, undefined],
    ] as const) {
      const error = thrown(call);
      expect(error).toBeInstanceOf(type);
      expect(error).toBeInstanceOf(Error);
      expect(error).toMatchObject({ name: type.name, code: code ?? expect.stringMatching(/^ERR_LC_/) });
      expect((error as Error).stack).toContain('errors.test.ts');
    }
    expect(thrown(() => setVramLimit('cuda:63', 1))).toBeInstanceOf(LcError);
  });

  it('is typed once: the same object, also from a promise and from another realm; strangers stay as they are', async () => {
    const coded = (error: Error, code: string): Error => Object.assign(error, { code });
    const plain = coded(new Error('no room'), 'ERR_LC_OUT_OF_MEMORY');
    const wrong = coded(new TypeError('not one of ours'), 'ERR_LC_DTYPE');
    const foreign = runInNewContext(`Object.assign(new TypeError('elsewhere'), { code: 'ERR_LC_SHAPE' })`) as Error;
    const stranger = coded(new Error('no file'), 'ENOENT');
    const own = new LcTypeError('ERR_LC_ARGUMENT', 'ours');
    const addon = throwsTyped(() => ({
      version: 3,
      fails: (error: unknown) => {
        throw error;
      },
      rejects: (error: unknown) => Promise.reject(error),
      adds: (x: number, y: number) => x + y,
    })) as { version: number; fails(e: unknown): void; rejects(e: unknown): Promise<void>; adds(x: number, y: number): number };
    expect([addon.version, addon.adds(1, 2)]).toEqual([3, 3]);
    expect(thrown(() => addon.fails(plain))).toBe(plain);
    expect(plain).toBeInstanceOf(LcError);
    await expect(addon.rejects(wrong)).rejects.toBe(wrong);
    expect(wrong).toBeInstanceOf(LcTypeError);
    expect(wrong).toBeInstanceOf(TypeError);
    expect(thrown(() => addon.fails(foreign))).toBeInstanceOf(LcTypeError);
    for (const other of [stranger, own, 'text', undefined, null]) expect(thrown(() => addon.fails(other))).toBe(other);
    expect(stranger).not.toBeInstanceOf(LcError);
    expect(asLcError(plain)).toBe(plain);
    expect(String(plain)).toBe('LcError: no room');
  });

  it("leaves the binary's own exports alone, which other threads and copies of the package share", () => {
    const exports = Object.freeze({ call: () => 1 });
    const addon = throwsTyped(() => exports) as typeof exports;
    expect(addon.call).not.toBe(exports.call);
    expect(core()).toBe(core());
  });
});

it('traceCalls sees every native call, which throws, returns and works as before, until it is told to stop', () => {
  using a = zeros([2, 3]);
  using wide = zeros([2, 2]);
  const seen: [string, unknown][] = [];
  traceCalls((name, [args], call) => {
    seen.push([name, args]);
    return call();
  });
  try {
    fill(a, 3);
    expect(thrown(() => gemm({ a, b: a, c: wide }))).toBeInstanceOf(LcTypeError);
    expect(memInfo('cpu').totalBytes).toBeGreaterThan(0);
  } finally {
    traceCalls(null);
  }
  fill(wide, 4);
  expect(a.data()[5]).toBe(3);
  expect(seen.map(([name]) => name)).toEqual(['fill', 'gemm', 'memInfo']);
  expect((seen[0] as [string, { dst: unknown }])[1].dst).toBe(a);
  for (const wrong of [undefined, 5] as unknown as null[])
    expect(thrown(() => traceCalls(wrong))).toMatchObject({ name: 'LcTypeError', code: 'ERR_LC_ARGUMENT' });
});

it('every code that native code names is one of LcErrorCode', () => {
  const packages = dirname(dirname(dirname(fileURLToPath(import.meta.url))));
  const known = readFileSync(join(packages, 'tensor/src/errors.ts'), 'utf8');
  const folders = [join(dirname(packages), 'native/include/lctx'), ...readdirSync(packages).map((name) => join(packages, name, 'native'))];
  const named = new Set<string>();
  for (const folder of folders) {
    for (const file of thrown(() => readdirSync(folder)) ? [] : readdirSync(folder)) {
      if (!/\.(cc|h|cu|cuh)$/.test(file)) continue;
      for (const [, code] of readFileSync(join(folder, file), 'utf8').matchAll(/"(ERR_LC_[A-Z_]+)"/g)) named.add(code as string);
    }
  }
  expect(named.size).toBeGreaterThan(10);
  expect([...named].filter((code) => !known.includes(`'${code}'`))).toEqual([]);
});
