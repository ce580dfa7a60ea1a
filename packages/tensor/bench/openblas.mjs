// OpenBLAS beside ours, if libopenblas.so.0 is on this machine: called from a small C program, so that nothing of Node is in its way.
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const source = `#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
typedef void (*sgemm_t)(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
static float* random_matrix(long n) { float* p = aligned_alloc(64, (4 * n + 63) / 64 * 64); for (long i = 0; i < n; i++) p[i] = rand() / (float)RAND_MAX - .5f; return p; }
int main(int argc, char** argv) {
  void* lib = dlopen("libopenblas.so.0", RTLD_NOW);
  if (!lib || argc < 6) return 3;
  sgemm_t sgemm = (sgemm_t)dlsym(lib, "cblas_sgemm");
  ((void (*)(int))dlsym(lib, "openblas_set_num_threads"))(atoi(argv[1]));
  const int m = atoi(argv[2]), n = atoi(argv[3]), k = atoi(argv[4]), tb = atoi(argv[5]);
  float *a = random_matrix((long)m * k), *b = random_matrix((long)k * n), *c = random_matrix((long)m * n);
  const double flops = 2.0 * m * n * k;
  const int repeat = 1 + (int)(1e8 / flops);
  double best = 1e9, spent = 0;
  for (int i = 0; i < 5 || spent < .2; i++) {
    double t = now();
    for (int r = 0; r < repeat; r++) sgemm(101, 111, tb ? 112 : 111, m, n, k, 1, a, k, b, tb ? k : n, 0, c, n);
    t = now() - t;
    spent += t;
    if (t / repeat < best) best = t / repeat;
  }
  printf("%.3f %s\\n", flops / best / 1e9, ((char* (*)(void))dlsym(lib, "openblas_get_corename"))());
  return 0;
}`;

/** Returns (threads, m, n, k, transB) -> { gflops, core }, or null where OpenBLAS or a C compiler is missing; `close()` removes the program. */
export function openblas() {
  const dir = mkdtempSync(join(tmpdir(), 'lc-bench-'));
  const close = () => rmSync(dir, { recursive: true, force: true });
  const env = { ...process.env };
  // Overrides for machines that old versions do not know: they slow the ones that it does.
  delete env.OPENBLAS_CORETYPE;
  delete env.OPENBLAS_L2_SIZE;
  const run = (...args) => {
    const text = execFileSync(join(dir, 'peer'), args.map(String), { env, encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] });
    const [gflops, core] = text.trim().split(' ');
    return { gflops: Number(gflops), core };
  };
  try {
    writeFileSync(join(dir, 'peer.c'), source);
    execFileSync('cc', ['-O2', '-o', join(dir, 'peer'), join(dir, 'peer.c'), '-ldl'], { stdio: 'ignore' });
    run(1, 8, 8, 8, 0);
  } catch {
    close();
    return null;
  }
  return { measure: (threads, m, n, k, transB) => run(threads, m, n, k, transB ? 1 : 0), close };
}
