// Proxies that ask enforcer authz: Debian's nginx (auth_request) and Caddy
// (forward_auth), in front of a host that guards nothing.
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { spawn } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import path from 'node:path';
import { once } from 'node:events';

const freePort = async () => {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address();
  server.close();
  await once(server, 'close');
  return port;
};

const host = url => new URL(url).host;
const names = ['Tenant', 'Issuer', 'Subject', 'Session', 'Client', 'Actors'];

const nginx = (at, port, dir) => {
  const set = names.map(n => `auth_request_set $i_${n.toLowerCase()} $upstream_http_interlock_${n.toLowerCase()}; proxy_set_header Interlock-${n} $i_${n.toLowerCase()};`).join('\n      ');
  writeFileSync(path.join(dir, 'nginx.conf'), `
daemon off; pid ${dir}/nginx.pid; error_log stderr crit;
events {}
http {
  access_log off;
  ${['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(n => `${n}_temp_path ${dir}/${n};`).join(' ')}
  server {
    listen 127.0.0.1:${port};
    location / {
      auth_request /enforcer;
      ${set}
      proxy_set_header Authorization "";
      proxy_pass http://${host(at.echo)};
    }
    location = /enforcer {
      internal;
      proxy_pass ${at.original}/;
      proxy_pass_request_body off;
      proxy_set_header Content-Length "";
      proxy_set_header X-Original-Method $request_method;
      proxy_set_header X-Original-Uri $request_uri;
      proxy_set_header X-Original-Host $host;
      proxy_set_header X-Original-Proto $scheme;
    }
  }
}`);
  return ['nginx', ['-p', dir, '-c', path.join(dir, 'nginx.conf')]];
};

const caddy = (at, port, dir) => {
  writeFileSync(path.join(dir, 'Caddyfile'), `
{
  admin off
  auto_https off
  storage file_system ${dir}/caddy
  log {
    level ERROR
  }
}
http://127.0.0.1:${port} {
  forward_auth ${host(at.forwarded)} {
    uri /
    copy_headers Interlock-Tenant Interlock-Issuer Interlock-Subject Interlock-Session Interlock-Client Interlock-Actors
  }
  reverse_proxy ${host(at.echo)} {
    header_up -Authorization
  }
}
`);
  return ['caddy', ['run', '--config', path.join(dir, 'Caddyfile'), '--adapter', 'caddyfile']];
};

/** Starts one and runs the cases against it. */
const behind = (name, make) => ({
  name,
  async run(at, control, dir, check) {
    const port = await freePort();
    const [command, args] = make(at, port, dir);
    const child = spawn(command, args, { stdio: ['ignore', 'inherit', 'inherit'], env: { ...process.env, HOME: dir, XDG_CONFIG_HOME: dir, XDG_DATA_HOME: dir } });
    const exit = new Promise((resolve, reject) => { child.once('exit', resolve); child.once('error', reject); });
    exit.catch(() => {});
    const get = (token, headers = {}) => fetch(`http://127.0.0.1:${port}/files/a?b=c`, {
      headers: token ? { Authorization: `Bearer ${token}`, ...headers } : headers,
    });
    try {
      await check(`${name}: starts`, async () => {
        for (let i = 0; ; i++) {
          try {
            await get();
            return;
          } catch (err) {
            if (i > 200 || child.exitCode !== null) throw err;
            await new Promise(resolve => setTimeout(resolve, 50));
          }
        }
      });
      const session = randomUUID();
      const token = await control('token', { user: 'ann', session });
      await check(`${name}: allows, and says who calls`, async () => {
        const res = await get(token, { 'Interlock-Subject': 'root', 'Interlock-Actors': 'forged' });
        assert.equal(res.status, 200);
        const { path: seen, headers } = await res.json();
        assert.equal(seen, '/files/a?b=c');
        assert.deepEqual(headers['Interlock-Subject'], ['ann']);
        assert.deepEqual(headers['Interlock-Session'], [session]);
        assert.equal(headers['Interlock-Actors']?.[0] ?? '', '');
        assert.equal(headers.Authorization, undefined);
      });
      await check(`${name}: challenges`, async () => {
        for (const bad of [undefined, 'garbage']) {
          const res = await get(bad);
          assert.equal(res.status, 401);
          assert.match(res.headers.get('www-authenticate'), /^Bearer .*resource_metadata=/);
        }
      });
      await check(`${name}: denies a revoked caller, and no other`, async () => {
        await control('revoke', { session });
        const res = await get(token);
        assert.equal(res.status, 401);
        assert.match(res.headers.get('www-authenticate'), /stolen-token/);
        assert.equal((await get(await control('token', { user: 'ann', session: randomUUID() }))).status, 200);
      });
    } finally {
      child.kill('SIGTERM');
      await exit.catch(() => {});
    }
  },
});

export const proxies = [behind('nginx, auth_request', nginx), behind('Caddy, forward_auth', caddy)];
