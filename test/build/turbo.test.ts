/** turbo's cache: what must be built again is, and nothing else. The hashes are compared on a copy; nothing is compiled. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { changed, native, packages, TurboCopy } from './workspace.js';

const allNative = native.map((name) => `${name}#build:native`).sort();
const nativeOf = (ids: readonly string[]) => ids.filter((id) => id.endsWith('build:native'));

describe('an edit', () => {
  let copy: TurboCopy;
  beforeAll(() => {
    copy = new TurboCopy();
  });
  afterAll(() => copy[Symbol.dispose]());
  const rebuilt = (edit: () => void, env: [Record<string, string>, Record<string, string>] = [{}, {}]): string[] => {
    const before = copy.tasks(env[0]);
    edit();
    return changed(before, copy.tasks(env[1]));
  };

  it('of nothing rebuilds nothing', () => {
    expect(rebuilt(() => {})).toEqual([]);
  });

  it('in native/ rebuilds every addon: headers, flags and scripts alike', () => {
    for (const file of ['include/lctx/abi.h', 'common.gypi', 'nvcc.cjs']) {
      expect(nativeOf(rebuilt(() => copy.append(`native/${file}`)))).toEqual(allNative);
    }
    expect(nativeOf(rebuilt(() => copy.write('native/include/lctx/new.h', '#pragma once\n')))).toEqual(allNative);
  });

  it("in one package's native code rebuilds that addon alone, and the packages that ship with it", () => {
    const ids = rebuilt(() => copy.append('packages/attention/native/addon.cc'));
    expect(nativeOf(ids)).toEqual(['attention#build:native']);
    expect(ids).toContain('attention#build');
    expect(ids).toContain('models#build');
    expect(ids).not.toContain('tensor#build');
    expect(ids).not.toContain('qlora#build');
  });

  it("in a new file of a package's native code rebuilds its addon", () => {
    expect(nativeOf(rebuilt(() => copy.write('packages/qlora/native/more.cu', '\n')))).toEqual(['qlora#build:native']);
  });

  it('in TypeScript rebuilds no addon, but the packages above it: their types are built from it', () => {
    const ids = rebuilt(() => copy.append('packages/tensor/src/index.ts'));
    expect(nativeOf(ids)).toEqual([]);
    expect(ids).toEqual(packages.map((name) => `${name}#build`).sort());
  });

  it('in tests, READMEs or build outputs rebuilds nothing', () => {
    const edit = () => {
      copy.append('packages/tensor/README.md');
      copy.write('packages/tensor/test/new.test.ts', '\n');
      copy.write('packages/tensor/native/build/Release/lc_tensor.node', 'x');
    };
    expect(rebuilt(edit)).toEqual([]);
  });

  it('of the compiler rebuilds every addon', () => {
    expect(nativeOf(rebuilt(() => copy.write('.toolchain', 'g++ 13\ncpu only\n')))).toEqual(allNative);
  });

  it.each([
    ['the target list', { LCTX_CUDA: '1', LCTX_CUDA_ARCHS: '80' }, { LCTX_CUDA: '1', LCTX_CUDA_ARCHS: '80,90a' }],
    ['CUDA on or off', { LCTX_CUDA: '0' }, { LCTX_CUDA: '1' }],
    ['the compiler by name', {}, { CXX: 'clang++' }],
    ['compiler flags', {}, { CXXFLAGS: '-g' }],
  ])('of %s rebuilds every addon', (_, before, after) => {
    expect(nativeOf(rebuilt(() => {}, [before as Record<string, string>, after as Record<string, string>]))).toEqual(allNative);
  });
});

describe('a second run', () => {
  it('is a full hit, and brings deleted outputs back', () => {
    using copy = new TurboCopy();
    const output = { build: 'dist/index.js', 'build:native': 'prebuilds/linux-x64/addon.node' };
    copy.stubScripts(
      (task) => `node -e "const f='${output[task as 'build']}';fs.mkdirSync(path.dirname(f),{recursive:true});fs.writeFileSync(f,'x')"`,
    );
    copy.run(['build']);
    expect([...copy.tasks().values()].filter((task) => task.cache.status !== 'HIT').map((task) => task.taskId)).toEqual([]);
    for (const name of native) copy.remove(`packages/${name}/prebuilds`);
    copy.remove('packages/data/dist');
    expect(copy.run(['build'])).toContain('FULL TURBO');
    for (const name of native) expect(copy.exists(`packages/${name}/prebuilds/linux-x64/addon.node`)).toBe(true);
    expect(copy.exists('packages/data/dist/index.js')).toBe(true);
  });
});
