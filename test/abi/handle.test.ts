/** One handle through separately built addons, and everything that must not be taken for one. */
import { spawnSync } from 'node:child_process';
import { copyFileSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { deviceMemory, fromTypedArray, memory, pointerOf, zeros } from '@lc/tensor';
import { expectNoLeaks } from '@lc/tensor/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  addonFile,
  buildAddons,
  type Core,
  coreFile,
  type Fake,
  type FakeOptions,
  fakeAddon,
  load,
  type ScaleAddon,
  scaleAddon,
} from './addons.js';

expectNoLeaks();

const MAGIC = 0x5458434c;
let a: ScaleAddon;
let b: ScaleAddon;
let fake: Fake;
let folder: string;
let core: Core;
let copy: Core;

beforeAll(() => {
  buildAddons();
  core = load<Core>(coreFile);
  a = scaleAddon('abi-addon-a');
  b = scaleAddon('abi-addon-b');
  fake = fakeAddon();
  folder = mkdtempSync(join(tmpdir(), 'lc-abi-'));
  copyFileSync(coreFile, join(folder, 'second-tensor.node'));
  copy = load<Core>(join(folder, 'second-tensor.node'));
}, 180_000);
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** What a JS Tensor looks like to native code, over a given external. */
const wearing = (handle: unknown): object => ({ handle, label: 'fake', meta: Float64Array.of(0, 0, 1, 4, 1) });
const faked = (options: Partial<FakeOptions>): object =>
  wearing(fake.handle({ magic: MAGIC, major: 1, minor: 0, tag: 'tensor', disposed: false, ...options }));
const refusal = (x: unknown): { code: string; message: string; type: boolean } => {
  try {
    a.scale({ x, factor: 2 });
  } catch (error) {
    const { code, message } = error as Error & { code: string };
    return { code, message, type: error instanceof TypeError };
  }
  throw new Error('was not refused');
};

describe('a tensor through two addons', () => {
  it('is the same memory in both, in views too', () => {
    using x = fromTypedArray(Float32Array.of(1, 2, 3, 4, 5, 6), [3, 2]);
    const at = a.scale({ x, factor: 10 });
    expect(b.scale({ x: x.rows(1, 2), factor: 0.5 })).toBe(at + 8n);
    expect(at).toBe(pointerOf(x));
    expect([...x.data()]).toEqual([10, 20, 15, 20, 25, 30]);
    b.scale({ x: x.slice(1, 1, 1), factor: -1 }); // strided rows
    expect([...x.data()]).toEqual([10, -20, 15, -20, 25, -30]);
  });

  it('is kept by the addon that retains it, after dispose() and until release(), which another binary made', () => {
    const live = (): number => deviceMemory('cpu').byLabel.held?.liveBytes ?? 0;
    const x = zeros([1000], { label: 'held' });
    x.data().fill(0.5);
    a.hold({ x });
    x.dispose();
    expect(live()).toBe(4000);
    expect(a.letGo()).toBe(500);
    expect(live()).toBe(0);
  });

  it('of a newer minor version is taken: fields are only ever appended', () => {
    expect(() => a.scale({ x: faked({ minor: 9 }), factor: 2 })).not.toThrow();
  });
});

describe('what is refused', () => {
  it('a handle of a future major: both versions and the fix are named', () => {
    const { code, message, type } = refusal(faked({ major: 2, minor: 3 }));
    expect(code).toBe('ERR_LC_ABI');
    expect(type).toBe(true);
    expect(message).toMatch(/^scale: x: made by tensor ABI v2\.3 but this addon was built for v1\.1; install matching @lc\/\* versions/);
  });

  it('an external with the tag of a stranger, with none, or without the magic number', () => {
    expect(refusal(faked({ tag: 'stranger' })).message).toContain('type tag mismatch');
    expect(refusal(faked({ tag: 'none' })).message).toContain('type tag mismatch');
    expect(refusal(faked({ tag: 'stranger' })).code).toBe('ERR_LC_NOT_A_TENSOR');
    expect(refusal(faked({ magic: 0xdead })).code).toBe('ERR_LC_ABI');
  });

  it.each([
    ['{}', {}],
    ['5', 5],
    ['null', null],
    ['undefined', undefined],
    ['a string', 'tensor'],
    ['a typed array', Float32Array.of(1, 2)],
    ['an object without an external', wearing({})],
    ['an object with a number for a handle', wearing(5)],
  ])('%s', (_name, x) => {
    const { code, message, type } = refusal(x);
    expect(code).toBe('ERR_LC_NOT_A_TENSOR');
    expect(type).toBe(true);
    expect(message).toMatch(/^scale: x: expected an @lc\/tensor Tensor/);
  });

  it('a bare handle without its meta, and a meta that lies', () => {
    using x = zeros([4]);
    expect(refusal(x.handle).code).toBe('ERR_LC_NOT_A_TENSOR');
    expect(refusal({ handle: x.handle, label: 'x' }).code).toBe('ERR_LC_NOT_A_TENSOR');
    expect(refusal({ handle: x.handle, label: 'x', meta: Float64Array.of(8, 0, 1, 4, 1) }).code).toBe('ERR_LC_OUT_OF_BOUNDS');
  });

  it('a disposed tensor, by its label', () => {
    const x = zeros([4], { label: 'checkpoints' });
    x.dispose();
    expect(refusal(x)).toMatchObject({ code: 'ERR_LC_DISPOSED', message: expect.stringContaining("'checkpoints' was disposed") });
    expect(refusal(faked({ disposed: true })).code).toBe('ERR_LC_DISPOSED');
  });

  it('a structuredClone: handles do not pass between threads, and what arrives without one is no tensor', async () => {
    using x = zeros([4]);
    expect(() => structuredClone(x.handle)).toThrow(/could not be cloned/);
    const script = `
      const { parentPort, workerData } = require('node:worker_threads');
      const core = require(workerData.core), a = require(workerData.a);
      a.init(core.api);
      try { a.scale({ x: workerData.x, factor: 2 }); parentPort.postMessage('taken'); } catch (e) { parentPort.postMessage(e.code); }`;
    const answer = await inWorker(script, { core: coreFile, a: addonFile('abi-addon-a'), x: { meta: x.meta, label: x.label, handle: {} } });
    expect(answer).toBe('ERR_LC_NOT_A_TENSOR');
  });

  it("by init: a table of another major or of an older minor, and anything that is no table; a newer minor's is taken", () => {
    const init = (api: object) => () => b.init(api);
    expect(init(fake.api(core.api, { major: 2, minor: 1, size: 64 }))).toThrow(
      expect.objectContaining({
        code: 'ERR_LC_ABI',
        message: expect.stringMatching(/@lc\/tensor has ABI v2\.1 but this addon was built for v1\.1/),
      }),
    );
    expect(init(fake.api(core.api, { major: 1, minor: 0, size: -8 }))).toThrow(expect.objectContaining({ code: 'ERR_LC_ABI' }));
    for (const api of [{}, fake.handle({ magic: MAGIC, major: 1, minor: 0, tag: 'tensor', disposed: false })])
      expect(init(api)).toThrow(expect.objectContaining({ code: 'ERR_LC_ABI' }));
    b.init(fake.api(core.api, { major: 1, minor: 9, size: 64 }));
    using x = fromTypedArray(Float32Array.of(1, 2), [2]);
    b.scale({ x, factor: 3 });
    expect([...x.data()]).toEqual([3, 6]);
    b.init(core.api);
  });
});

describe('a second @lc/tensor in one process', () => {
  it('adopts the table of the first: one count of memory, and handles that go both ways', () => {
    expect(core.adopted).toBe(false);
    expect(copy.adopted).toBe(true);
    const handle = copy.alloc(0, [4], 1, 0, true, 'from the copy');
    expect(deviceMemory('cpu').byLabel['from the copy']).toMatchObject({ liveBytes: 16, liveTensors: 1 });
    expect(copy.memory()).toEqual(memory().devices);

    const x = wearing(handle);
    const { buffer, loan } = core.buffer(handle);
    new Float32Array(buffer).fill(3);
    a.scale({ x, factor: 2 });
    expect([...new Float32Array(buffer)]).toEqual([6, 6, 6, 6]);
    core.detach(buffer, loan);
    expect(core.dispose(handle)).toBe(true);
    expect(copy.dispose(handle)).toBe(false);
    expect(copy.memory()).toEqual(memory().devices);

    using y = zeros([4]);
    const borrowed = copy.buffer(y.handle);
    new Float32Array(borrowed.buffer).fill(1);
    expect([...y.data()]).toEqual([1, 1, 1, 1]);
    copy.detach(borrowed.buffer, borrowed.loan);
  });

  it('adopts it in a worker too, where the addons work on its tensors', async () => {
    const script = `
      const { parentPort, workerData } = require('node:worker_threads');
      const copy = require(workerData.copy), a = require(workerData.a);
      a.init(copy.api);
      const handle = copy.alloc(0, [4], 1, 0, true, 'worker copy');
      const { buffer, loan } = copy.buffer(handle);
      const values = new Float32Array(buffer).fill(2);
      a.scale({ x: { handle, label: 'x', meta: Float64Array.of(0, 0, 1, 4, 1) }, factor: 4 });
      const live = copy.memory().cpu.byLabel['worker copy'].liveBytes;
      const sum = values.reduce((s, v) => s + v, 0);
      copy.detach(buffer, loan);
      copy.dispose(handle);
      parentPort.postMessage({ adopted: copy.adopted, live, sum });`;
    const answer = await inWorker(script, { copy: join(folder, 'second-tensor.node'), a: addonFile('abi-addon-a') });
    expect(answer).toEqual({ adopted: true, live: 16, sum: 32 });
    expect(deviceMemory('cpu').byLabel['worker copy']).toMatchObject({ liveBytes: 0, peakBytes: 16 });
  });

  it('refuses to join one of another major, naming both', () => {
    const script = `require(${JSON.stringify(addonFile('abi-fake'))});
      try { require(${JSON.stringify(coreFile)}); console.log('joined'); }
      catch (e) { console.log(JSON.stringify({ code: e.code, type: e instanceof TypeError, message: e.message })); }`;
    const { stdout, status } = spawnSync(process.execPath, ['-e', script], { encoding: 'utf8' });
    expect(status).toBe(0);
    const answer = JSON.parse(stdout) as { code: string; type: boolean; message: string };
    expect(answer).toMatchObject({ code: 'ERR_LC_ABI', type: true });
    expect(answer.message).toMatch(
      new RegExp(`@lc/tensor ${core.buildInfo.version} \\(ABI v1\\) cannot join @lc/tensor 9\\.8\\.7 \\(ABI v2\\).*install one version`),
    );
  });
});

function inWorker(script: string, workerData: object): Promise<unknown> {
  return new Promise((resolve, reject) => {
    const worker = new Worker(script, { eval: true, workerData });
    let answer: unknown;
    worker.on('message', (message) => {
      answer = message;
    });
    worker.on('error', reject);
    worker.on('exit', (code) => (code === 0 ? resolve(answer) : reject(new Error(`worker exited with ${code}`))));
  });
}
