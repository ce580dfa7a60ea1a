/** The @lc packages that can be found from here, and what their binaries were built from: read from the files, so it works where a binary does not load. */
import { existsSync, readdirSync, readFileSync, realpathSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import type { BuildInfo } from '@lc/tensor';

/** One copy of a package on disk. */
export interface InstalledPackage {
  name: string;
  version: string;
  path: string;
  /** null: TypeScript alone. `file` null: the binary is missing; `build` null: it does not say what it was built from. */
  native: { file: string | null; build: BuildInfo | null } | null;
}

interface Manifest {
  name?: string;
  version?: string;
  files?: string[];
  dependencies?: Record<string, string>;
  peerDependencies?: Record<string, string>;
}
const OURS = ['tensor', 'attention', 'chunked-ce', 'tiled-mlp', 'offload-ckpt', 'qlora', 'vram-probe', 'models', 'data', 'trainer'].map(
  (name) => `@lc/${name}`,
);
const json = <T>(file: string): T | null => {
  try {
    return JSON.parse(readFileSync(file, 'utf8')) as T;
  } catch {
    return null;
  }
};
const list = (dir: string): string[] => {
  try {
    return readdirSync(dir).sort();
  } catch {
    return [];
  }
};

/** The text `lc_build_info {...}` in an addon's file. */
export function buildInfoOf(file: string): BuildInfo | null {
  try {
    const text = /lc_build_info (\{[^}]*\})/.exec(readFileSync(file, 'latin1'))?.[1];
    return text ? (JSON.parse(text) as BuildInfo) : null;
  } catch {
    return null;
  }
}

function binaryOf(name: string, path: string): string | null {
  const folder = process.env.LCTX_ADDON_DIR;
  if (folder) {
    const file = join(folder, `${name.replace('/', '+')}.glibc.node`);
    return existsSync(file) ? file : null;
  }
  const prebuilds = join(path, 'prebuilds', `${process.platform}-${process.arch}`);
  const file = list(prebuilds).find((each) => each.endsWith('.node'));
  return file ? join(prebuilds, file) : null;
}

/** The package folder that a file lies in. */
function rootOf(file: string, name: string): string | null {
  for (let dir = dirname(file); dir !== dirname(dir); dir = dirname(dir)) {
    if (json<Manifest>(join(dir, 'package.json'))?.name === name) return dir;
  }
  return null;
}

/**
 * Every copy of every `@lc` package, by name, then path.
 * @param from files or folders whose node_modules are searched, and those above them
 */
export function installedPackages(from: readonly string[]): InstalledPackage[] {
  const roots = new Set<string>();
  const add = (path: string | null): void => {
    if (path && existsSync(join(path, 'package.json'))) roots.add(realpathSync(path));
  };
  // The folders above, and not NODE_PATH: pnpm points that at everything in its store, used here or not.
  for (const base of from) {
    for (let dir = base; ; dir = dirname(dir)) {
      for (const name of list(join(dir, 'node_modules/@lc'))) add(join(dir, 'node_modules/@lc', name));
      if (OURS.includes(json<Manifest>(join(dir, 'package.json'))?.name ?? '')) add(dir);
      if (dir === dirname(dir)) break;
    }
  }
  const resolve = (base: string, name: string): void => {
    try {
      add(rootOf(createRequire(join(base, 'package.json')).resolve(name), name));
    } catch {
      // not installed there
    }
  };
  // Yarn's Plug'n'Play has no node_modules, but a resolver.
  if (process.versions.pnp) for (const base of from) for (const name of OURS) resolve(base, name);
  // What these packages use themselves may lie elsewhere. The set grows meanwhile, and so does the loop.
  for (const root of roots) {
    const { dependencies, peerDependencies } = json<Manifest>(join(root, 'package.json')) ?? {};
    for (const name of Object.keys({ ...dependencies, ...peerDependencies })) if (name.startsWith('@lc/')) resolve(root, name);
  }
  const found: InstalledPackage[] = [];
  for (const path of roots) {
    const manifest = json<Manifest>(join(path, 'package.json'));
    if (!manifest?.name) continue;
    const file = binaryOf(manifest.name, path);
    const native = manifest.files?.includes('prebuilds') ? { file, build: file ? buildInfoOf(file) : null } : null;
    found.push({ name: manifest.name, version: manifest.version ?? '?', path, native });
  }
  return found.sort((a, b) => a.name.localeCompare(b.name) || a.path.localeCompare(b.path));
}
