// Runs everything against one server process and counts. See ./run.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import path from 'node:path';
import { stacks } from './clients.mjs';
import { agents } from './agents.mjs';
import { proxies } from './proxies.mjs';
import { compareScores } from './conformance.mjs';

const work = process.argv[2];
let passed = 0;
let failed = 0;

/** Runs one check; it fails by throwing. */
async function check(name, run) {
  const began = performance.now();
  let timer;
  try {
    await Promise.race([
      run(),
      new Promise((_, reject) => { timer = setTimeout(() => reject(new Error('no end after 300 s')), 300_000); }),
    ]);
    passed++;
    console.log(`ok    ${name} (${Math.round(performance.now() - began)} ms)`);
  } catch (err) {
    failed++;
    console.log(`FAIL  ${name}: ${err?.stack ?? err}`);
  } finally {
    clearTimeout(timer);
  }
}

const server = spawn(path.join(work, 'server'), { stdio: ['pipe', 'pipe', 'inherit'] });
const ended = once(server, 'exit');
try {
  const [line] = await once(createInterface({ input: server.stdout }), 'line');
  const at = JSON.parse(line);
  const control = async (what, body = {}) => {
    const res = await fetch(`${at.control}/${what}`, { method: 'POST', body: JSON.stringify(body) });
    if (!res.ok) throw new Error(`control ${what}: ${res.status} ${await res.text()}`);
    return res.json();
  };
  for (const stack of stacks) {
    for (const [name, run] of Object.entries(stack.cases(at.guarded, control))) {
      await check(`${stack.name}: ${name}`, run);
    }
  }
  for (const stack of stacks) {
    for (const [name, run] of Object.entries(stack.cases(at.proxied, control))) {
      await check(`${stack.name}, through the proxy: ${name}`, run);
    }
  }
  for (const proxy of proxies) {
    await proxy.run(at, control, work, check);
  }
  for (const stack of agents) {
    for (const [name, run] of Object.entries(stack.cases(at.a2a, control))) {
      await check(`${stack.name}: ${name}`, run);
    }
  }
  await control('release');
  await compareScores(check, at, work);
} catch (err) {
  failed++;
  console.log(`FAIL  runner: ${err?.stack ?? err}`);
} finally {
  server.stdin.end();
}
const [code] = await ended;
if (code !== 0) {
  failed++;
  console.log(`FAIL  the server ended with ${code}`);
}
console.log(`interop: ${passed} passed, ${failed} failed`);
process.exitCode = failed === 0 && passed > 0 ? 0 : 1;
