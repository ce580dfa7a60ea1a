import { execFileSync } from 'node:child_process';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { loadAddon } from '@lc/tensor';

export const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))));
const require = createRequire(import.meta.url);

/** Built like any package's addon: same gyp fragments, same flags. */
export function buildAddons(): void {
  execFileSync(process.execPath, [join(root, 'native/build.cjs'), 'test/abi-addon-a', 'test/abi-addon-b', 'test/abi-fake'], {
    cwd: root,
    stdio: ['ignore', 'ignore', 'inherit'],
  });
}

export const addonFile = (name: string): string => join(root, 'test', name, `prebuilds/linux-x64/@lc+${name}.glibc.node`);
export const coreFile = join(root, 'packages/tensor/prebuilds/linux-x64/@lc+tensor.glibc.node');

export interface ScaleAddon {
  init(api: object): void;
  /** Multiplies in place; gives back the address it worked at. */
  scale(args: { x: unknown; factor: number }): bigint;
  hold(args: { x: unknown }): void;
  letGo(): number;
}
export const scaleAddon = (name: 'abi-addon-a' | 'abi-addon-b'): ScaleAddon =>
  loadAddon<ScaleAddon>({ packageName: `@lc/${name}`, from: join(root, 'test', name, 'src/index.ts') })();

export interface FakeOptions {
  magic: number;
  major: number;
  minor: number;
  tag: 'tensor' | 'stranger' | 'none';
  disposed: boolean;
}
export interface Fake {
  handle(options: FakeOptions): object;
  api(real: object, options: { major: number; minor: number; size: number }): object;
}
export const fakeAddon = (): Fake => require(addonFile('abi-fake')) as Fake;

/** What of the core's surface these tests use without TypeScript around it. */
export interface Core {
  api: object;
  adopted: boolean;
  buildInfo: { version: string; abi: string };
  alloc(dtype: number, shape: number[], deviceType: number, deviceId: number, zero: boolean, label: string): object;
  dispose(handle: object): boolean;
  buffer(handle: object): { buffer: ArrayBuffer; loan?: object };
  detach(buffer: ArrayBuffer, loan: object | undefined): void;
  memory(): Record<string, unknown>;
}
export const load = <T>(file: string): T => require(file) as T;
