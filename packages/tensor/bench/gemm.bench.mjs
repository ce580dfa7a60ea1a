// f32 GEMM beside OpenBLAS (if libopenblas is on this machine), in one run: node bench/gemm.bench.mjs
// Build the packages first (npm run build). LCTX_NUM_THREADS sets the threads of both.
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import { empty, gemm, numThreads } from '../dist/index.js';

const shapes = [
  [256, 256, 256],
  [1024, 1024, 1024],
  [2048, 2048, 2048],
  [4096, 384, 192],
  [512, 4096, 192],
  [4096, 64, 192],
  [1024, 512, 2880],
];
const random = (t) => {
  const d = t.data();
  for (let i = 0; i < d.length; i++) d[i] = Math.random() - 0.5;
  return t;
};

/** Best of several runs, in GFLOP/s. */
function measure(m, n, k, transB) {
  const a = random(empty([m, k]));
  const b = random(empty(transB ? [n, k] : [k, n]));
  const c = empty([m, n]);
  let best = Number.POSITIVE_INFINITY;
  for (let i = 0, spent = 0; i < 5 || spent < 0.4; i++) {
    const start = process.hrtime.bigint();
    gemm({ a, b, c, transB });
    const seconds = Number(process.hrtime.bigint() - start) / 1e9;
    best = Math.min(best, seconds);
    spent += seconds;
  }
  for (const t of [a, b, c]) t.dispose();
  return (2 * m * n * k) / best / 1e9;
}

// OpenBLAS is called from a small C program that does the same, so that nothing of Node is in its way.
const source = `#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
typedef void (*sgemm_t)(int,int,int,int,int,int,float,const float*,int,const float*,int,float,float*,int);
static double now(void){struct timespec t;clock_gettime(CLOCK_MONOTONIC,&t);return t.tv_sec+t.tv_nsec*1e-9;}
int main(int argc,char**argv){void*h=dlopen("libopenblas.so.0",RTLD_NOW);if(!h)return 3;
sgemm_t f=(sgemm_t)dlsym(h,"cblas_sgemm");void(*threads)(int)=(void(*)(int))dlsym(h,"openblas_set_num_threads");threads(atoi(argv[1]));
char*(*core)(void)=(char*(*)(void))dlsym(h,"openblas_get_corename");fprintf(stderr,"OpenBLAS kernel: %s\\n",core());
for(int s=2;s<argc;s+=3)for(int tb=0;tb<2;tb++){int m=atoi(argv[s]),n=atoi(argv[s+1]),k=atoi(argv[s+2]);
float*a=malloc(4l*m*k),*b=malloc(4l*k*n),*c=malloc(4l*m*n);for(long i=0;i<(long)m*k;i++)a[i]=rand()/(float)RAND_MAX-.5f;for(long i=0;i<(long)k*n;i++)b[i]=rand()/(float)RAND_MAX-.5f;
double best=1e9,spent=0;for(int i=0;i<5||spent<.4;i++){double t=now();f(101,111,tb?112:111,m,n,k,1,a,k,b,tb?k:n,0,c,n);t=now()-t;if(t<best)best=t;spent+=t;}
printf("%.1f\\n",2.0*m*n*k/best/1e9);free(a);free(b);free(c);}return 0;}`;
function openblas() {
  const dir = mkdtempSync(join(tmpdir(), 'lc-bench-'));
  try {
    writeFileSync(join(dir, 'b.c'), source);
    execFileSync('gcc', ['-O2', '-o', join(dir, 'b'), join(dir, 'b.c'), '-ldl']);
    const env = { ...process.env };
    delete env.OPENBLAS_CORETYPE; // an override for old versions would slow it
    delete env.OPENBLAS_L2_SIZE;
    return execFileSync(join(dir, 'b'), [String(numThreads()), ...shapes.flat().map(String)], {
      env,
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'inherit'],
    })
      .trim()
      .split('\n')
      .map(Number);
  } catch {
    return [];
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
}

console.log(`${cpus()[0].model}, ${numThreads()} threads, f32, GFLOP/s (best of repeated runs)`);
const peer = openblas();
console.log('| m x n x k | b | lc | OpenBLAS | ratio |\n|---|---|---|---|---|');
shapes.forEach(([m, n, k], i) => {
  for (const transB of [false, true]) {
    const ours = measure(m, n, k, transB);
    const theirs = peer[i * 2 + (transB ? 1 : 0)];
    console.log(
      `| ${m} x ${n} x ${k} | ${transB ? 'n x k' : 'k x n'} | ${ours.toFixed(1)} | ${theirs?.toFixed(1) ?? 'not found'} | ${theirs ? (ours / theirs).toFixed(2) : ''} |`,
    );
  }
});
