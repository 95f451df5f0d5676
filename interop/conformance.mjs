// The MCP conformance suites against the same server, plain and guarded. What
// counts is that the guard changes no verdict, scenario by scenario.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdir, readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const suites = [
  { revision: '2025-11-25', program: 'conformance-2025', args: [] },
  { revision: '2026-07-28', program: 'conformance-2026', args: ['--requirements', '2026-07-28'] },
];

export async function compareScores(check, at, work) {
  for (const suite of suites) {
    const plain = await score(suite, at.plain, path.join(work, suite.revision, 'plain'));
    const guarded = await score(suite, at.signed, path.join(work, suite.revision, 'guarded'));
    await check(`conformance ${suite.revision}: the same score with the guard (${total(guarded)}; ${total(plain)} without)`, async () => {
      assert.ok(Object.keys(plain).length > 10, `only ${Object.keys(plain).length} scenarios ran`);
      assert.ok(sum(plain).SUCCESS > 10, 'almost nothing passed: the suite did not reach the server');
      assert.deepEqual(guarded, plain);
    });
  }
}

/** Runs a suite, and returns the number of each verdict for every scenario. */
async function score({ program, args }, url, dir) {
  await mkdir(dir, { recursive: true });
  const main = fileURLToPath(new URL(`node_modules/${program}/dist/index.js`, import.meta.url));
  const child = spawn(process.execPath, [main, 'server', '--url', url, '-o', dir, ...args], { stdio: ['ignore', 'pipe', 'pipe'] });
  let said = '';
  for (const stream of [child.stdout, child.stderr]) stream.on('data', chunk => { said = (said + chunk).slice(-4096); });
  await new Promise((resolve, reject) => child.on('error', reject).on('close', resolve)); // it exits with 1 when a scenario failed
  const scores = {};
  for (const entry of await readdir(dir, { withFileTypes: true })) {
    // server-<scenario>-<time of day>
    const scenario = entry.name.replace(/-\d{4}-\d{2}-\d{2}T.*$/, '');
    const checks = JSON.parse(await readFile(path.join(dir, entry.name, 'checks.json'), 'utf8'));
    const verdicts = checks.filter(c => c.status !== 'INFO').map(c => `${c.id} ${c.status}`);
    scores[scenario] = verdicts.sort();
  }
  if (Object.keys(scores).length === 0) throw new Error(`${program} wrote no results: ${said}`);
  return scores;
}

function sum(scores) {
  const n = {};
  for (const v of Object.values(scores).flat()) n[v.split(' ').at(-1)] = (n[v.split(' ').at(-1)] ?? 0) + 1;
  return n;
}

function total(scores) {
  const n = sum(scores);
  return `${n.SUCCESS ?? 0} of ${Object.values(n).reduce((a, b) => a + b, 0)} checks`;
}
