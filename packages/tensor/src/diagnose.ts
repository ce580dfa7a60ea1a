/** Why a native binary did not load, all of it, and what to do about it on this platform with this package manager. Runs only after a failure. */
import { closeSync, existsSync, fstatSync, openSync, readdirSync, readFileSync, readSync } from 'node:fs';
import { dirname, join, sep } from 'node:path';

/** The oldest glibc that published binaries load with. */
export const GLIBC_NEEDED = '2.34';

/** Where we run; an argument, so that tests can be elsewhere. */
export interface Where {
  platform: string;
  arch: string;
  /** Version of glibc; null: another C library. */
  glibc: string | null;
  /** Version of Yarn's Plug'n'Play, if it resolves modules. */
  pnp: string | null;
  cwd: string;
  env: NodeJS.ProcessEnv;
}

/** Version of glibc that this process runs with; null: another C library. */
export function glibcVersion(): string | null {
  const report = process.report as (NodeJS.ProcessReport & { excludeNetwork?: boolean }) | undefined;
  if (!report) return null;
  // Names of the machine's network peers would be looked up, which takes seconds where there is no name server.
  const before = report.excludeNetwork;
  report.excludeNetwork = true;
  const { header } = report.getReport() as { header?: { glibcVersionRuntime?: string } };
  if (before === undefined) delete report.excludeNetwork;
  else report.excludeNetwork = before;
  return header?.glibcVersionRuntime ?? null;
}

export function here(): Where {
  return {
    platform: process.platform,
    arch: process.arch,
    glibc: glibcVersion(),
    pnp: process.versions.pnp ?? null,
    cwd: process.cwd(),
    env: process.env,
  };
}

const older = (version: string, than: string): boolean => {
  const [a, b] = [version, than].map((v) => v.split('.').map(Number));
  return ((a?.[0] ?? 0) - (b?.[0] ?? 0) || (a?.[1] ?? 0) - (b?.[1] ?? 0)) < 0;
};

export type PackageManager = 'npm' | 'pnpm' | 'yarn' | 'bun';

/** By the lockfile of the project that the package is installed in, else by who started the process. */
export function packageManager(root: string, where: Pick<Where, 'cwd' | 'env'>): PackageManager {
  const locks: [string, PackageManager][] = [
    ['pnpm-lock.yaml', 'pnpm'],
    ['yarn.lock', 'yarn'],
    ['bun.lock', 'bun'],
    ['bun.lockb', 'bun'],
    ['package-lock.json', 'npm'],
  ];
  for (const start of [root, where.cwd]) {
    for (let dir = start; ; dir = dirname(dir)) {
      const lock = locks.find(([file]) => existsSync(join(dir, file)));
      if (lock) return lock[1];
      if (dir === dirname(dir)) break;
    }
  }
  const agent = where.env.npm_config_user_agent?.split('/')[0];
  return agent === 'pnpm' || agent === 'yarn' || agent === 'bun' ? agent : 'npm';
}
const reinstall = { npm: 'npm install --force', pnpm: 'pnpm install --force', yarn: 'yarn install --force', bun: 'bun install --force' };
const updateAll = { npm: 'npm update "@lc/*"', pnpm: 'pnpm update "@lc/*"', yarn: 'yarn up "@lc/*"', bun: 'bun update' };
/** The command that brings all @lc packages to one version. */
export const updateCommand = (root: string, where: Where): string => updateAll[packageManager(root, where)];

const machines: Record<number, string> = { 3: 'x86', 40: 'arm', 62: 'x64', 183: 'arm64', 243: 'riscv64', 21: 'ppc64', 22: 's390x' };

/** What is wrong with a file as a Linux library for `arch`; null: nothing that can be seen from outside. */
export function fileProblem(file: string, arch: string): string | null {
  let fd: number;
  try {
    fd = openSync(file, 'r');
  } catch (error) {
    return `cannot be read: ${(error as Error).message}`;
  }
  try {
    const { size } = fstatSync(fd);
    const head = Buffer.alloc(64);
    const got = readSync(fd, head, 0, 64, 0);
    if (size === 0) return 'is empty';
    if (got < 64 || head.readUInt32BE(0) !== 0x7f454c46) {
      const text = head.toString('latin1', 0, Math.min(got, 24)).replace(/[^ -~]/g, '.');
      return `is no Linux library: ${size} bytes that begin with '${text}'`;
    }
    const machine = head.readUInt16LE(18);
    if (machines[machine] !== arch) return `is for ${machines[machine] ?? `machine ${machine}`}, and this Node is ${arch}`;
    // The table of sections ends a library that a linker wrote.
    const end = Number(head.readBigUInt64LE(40)) + head.readUInt16LE(58) * head.readUInt16LE(60);
    return size < end ? `is cut off: ${size} of at least ${end} bytes` : null;
  } finally {
    closeSync(fd);
  }
}

export interface Attempt {
  packageName: string;
  /** The package's folder, as far as it is known. */
  root: string;
  /** The file that was chosen; null where none was found. */
  file: string | null;
  /** What was thrown. */
  cause: unknown;
}
export interface Diagnosis {
  reasons: string[];
  fixes: string[];
}

/** Every reason that can be found, the most decisive first, and a fix for each kind. */
export function diagnose({ packageName, root, file, cause }: Attempt, where: Where): Diagnosis {
  const reasons: string[] = [];
  const fixes = new Set<string>();
  const because = (reason: string, fix: string): void => {
    reasons.push(reason);
    fixes.add(fix);
  };
  const manager = packageManager(root, where);
  const folder = where.env.LCTX_ADDON_DIR;
  const name = `${packageName.replace('/', '+')}.glibc.node`;
  const message = cause instanceof Error ? (cause.message.split('\n')[0] ?? '') : String(cause);

  if (where.platform !== 'linux' || where.arch !== 'x64') {
    because(
      `this is ${where.platform}-${where.arch}, and binaries are published for linux-x64`,
      'run it on Linux on x86-64 (in WSL or a container, with `--platform linux/amd64`), with an x64 build of Node',
    );
  } else if (where.glibc === null) {
    because(
      `this Node runs on another C library than glibc (musl, as in Alpine), and binaries need glibc ${GLIBC_NEEDED} or newer`,
      'use an image with glibc, e.g. node:22-bookworm-slim instead of node:22-alpine',
    );
  } else if (older(where.glibc, GLIBC_NEEDED)) {
    because(
      `this system has glibc ${where.glibc}, and binaries need ${GLIBC_NEEDED} or newer`,
      'use a system with a newer one: RHEL 9, Ubuntu 22.04, Debian 12, or a container of them',
    );
  }

  if (folder) {
    const wanted = join(folder, name);
    if (!existsSync(folder)) because(`LCTX_ADDON_DIR is ${folder}, which does not exist`, 'correct LCTX_ADDON_DIR, or unset it');
    else if (!existsSync(wanted))
      because(`LCTX_ADDON_DIR is ${folder}, which has no ${name}`, `copy ${name} there, or unset LCTX_ADDON_DIR`);
  } else if (file === null) {
    const manifest = join(root, 'package.json');
    const prebuilds = join(root, 'prebuilds');
    if (!existsSync(manifest) || !readFileSync(manifest, 'utf8').includes(`"${packageName}"`)) {
      because(
        `${root} is not the folder of ${packageName}: its code was bundled or moved away from its binary`,
        `leave @lc/* out of the bundle (esbuild --external:'@lc/*', webpack externals, Next.js serverExternalPackages), or copy ` +
          `prebuilds/linux-x64/${name} of each package into one folder and set LCTX_ADDON_DIR to it`,
      );
    } else if (!existsSync(prebuilds)) {
      because(
        `${prebuilds} is missing: binaries lie in the package itself, so something left it out of the copy (a clean-up tool, .dockerignore, a partial install)`,
        `install the package again (${reinstall[manager]}), or in the repository run: npm run build`,
      );
    } else {
      const have = readdirSync(prebuilds).flatMap((dir) => readdirSync(join(prebuilds, dir)).map((each) => `${dir}/${each}`));
      because(`${prebuilds} has ${have.join(', ') || 'nothing in it'}`, `install the package again (${reinstall[manager]})`);
    }
    if ((cause as { code?: string } | null)?.code === 'MODULE_NOT_FOUND') {
      because(`node-gyp-build, which finds the binary, is not installed: ${message}`, `install dependencies (${reinstall[manager]})`);
    }
  }

  if (file !== null && existsSync(file)) {
    const problem = fileProblem(file, where.arch);
    if (problem) because(`${file} ${problem}`, `install the package again (${reinstall[manager]})`);
    else {
      const version = /version [`'](GLIBC(?:XX)?_[\d.]+)' not found/.exec(message)?.[1];
      if (version)
        because(`${file} needs ${version}`, 'use a system with a newer C library: RHEL 9, Ubuntu 22.04, Debian 12, or a container of them');
      const missing = /(lib[\w+.-]+\.so[\w.]*): cannot open shared object file/.exec(message)?.[1];
      if (missing) because(`${file} needs ${missing}, which is not installed`, `install the system package that has ${missing}`);
      if (/Operation not permitted|failed to map segment/.test(message)) {
        because(`${file} may not be mapped for execution`, 'its file system is mounted noexec: install elsewhere, or mount it with exec');
      }
    }
    reasons.push(`the loader said: ${message}`);
  }

  if (where.pnp && (file ?? root).match(/\.zip|__virtual__|\.yarn[\\/]cache/)) {
    because(
      `Yarn Plug'n'Play keeps ${packageName} in a zip, and a binary loads from a file`,
      `unplug it: "dependenciesMeta": { "${packageName}": { "unplugged": true } } in package.json, then yarn install; or nodeLinker: node-modules in .yarnrc.yml`,
    );
  }
  if (root.includes(`${sep}app.asar${sep}`)) {
    because(`${root} lies in Electron's archive`, "unpack it: asarUnpack: '**/node_modules/@lc/**'");
  }
  return { reasons, fixes: [...fixes] };
}

/** One message: what failed, every reason, every fix. */
export function explain(what: string, { reasons, fixes }: Diagnosis): string {
  return [
    `${what}:`,
    ...reasons.map((reason) => `  - ${reason}`),
    fixes.length > 1 ? 'To fix it:' : '',
    ...fixes.map((fix) => (fixes.length > 1 ? `  - ${fix}` : `To fix it, ${fix}`)),
  ]
    .filter((line) => line !== '')
    .join('\n');
}
