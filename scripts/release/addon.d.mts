export const GLIBC_FLOOR: string;
export const TARBALL_LIMIT: number;
export interface AddonInfo {
  version: string;
  abi: string;
  napi: number;
  compiler: string;
  cuda: boolean;
  cudaTargets?: string;
  cudaToolkit?: string;
}
export function buildInfo(bytes: Buffer): AddonInfo | undefined;
export function gpuCode(bytes: Buffer): Map<string, number>;
export function expectedCode(targets: readonly string[]): string[];
export function glibc(file: string): string;
export function inspect(
  name: string,
  file: string,
  wanted: { version: string; targets: readonly string[] | null },
): { info: AddonInfo | undefined; code: Map<string, number>; glibc: string; problems: string[] };
