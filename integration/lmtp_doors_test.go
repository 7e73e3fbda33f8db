package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestLMTPDoors: the ways in that an MTA may choose, with stock clients: a unix
// socket, STARTTLS, STARTTLS with a certificate that is asked for, implicit TLS.
func TestLMTPDoors(t *testing.T) {
	t.Parallel()
	d, b := newDovecot(t), newDovecot(t)
	s := takesMail(newSite(t, d.backend(), b.backend(), "u0001"))
	// A socket gets the group of a directory with the setgid bit: so Postfix,
	// and not everybody, may write to it.
	sockets := newDir(t, "sock")
	must(t, exec.Command("chown", "root:postfix", sockets).Run())
	must(t, os.Chmod(sockets, 0o750|os.ModeSetgid))
	socket := filepath.Join(sockets, "lmtp")
	s.doors = append(s.doors,
		fmt.Sprintf(`{protocol: lmtp, address: "unix:%s"}`, socket),
		`{protocol: lmtp, address: "$HOST:2401", tls: starttls}`,
		fmt.Sprintf(`{protocol: lmtp, address: "$HOST:2402", tls: starttls, client_ca: %s}`, lab.ca.file),
		fmt.Sprintf(`{protocol: lmtp, address: "$HOST:2403", tls: implicit, client_ca: %s}`, lab.ca.file),
	)
	p := startFrontend(t, s)
	certDir := newDir(t, "mta")
	cert, key := lab.ca.issue(t, certDir, "mta.test", "127.0.0.1")
	var sent []*parcel
	arrives := func(t *testing.T, m *parcel) {
		t.Helper()
		sent = append(sent, m)
		mustHold(t, d, "u0001", sent...)
	}

	byPostfix := func(target string, settings ...string) func(t *testing.T) {
		return func(t *testing.T) {
			mx := startPostfix(t, target, settings...)
			m := newParcel("u0001@example.org")
			mx.send(t, m)
			mx.waitEmpty(t, 20*time.Second)
			mx.mustNotBounce(t)
			if again := mx.deferred(); len(again) > 0 {
				t.Errorf("deferred: %+v", again)
			}
			arrives(t, m)
		}
	}
	tls := []string{"lmtp_tls_security_level = secure", "lmtp_tls_CAfile = " + lab.ca.file, "lmtp_tls_secure_cert_match = " + p.name}
	withCert := append([]string{"lmtp_tls_cert_file = " + cert, "lmtp_tls_key_file = " + key}, tls...)
	t.Run("postfix/unix", byPostfix("unix:"+socket))
	t.Run("postfix/starttls", byPostfix("inet:"+p.host+":2401", tls...))
	t.Run("postfix/client certificate", byPostfix("inet:"+p.host+":2402", withCert...))
	t.Run("postfix/no certificate", func(t *testing.T) {
		mx := startPostfix(t, "inet:"+p.host+":2402", tls...)
		mx.send(t, newParcel("u0001@example.org"))
		within(t, 20*time.Second, "Postfix is told to come again", func() bool { return len(mx.deferred()) > 0 })
		mx.mustNotBounce(t) // a missing certificate is a fault of the set-up, not of the message
		if sent := mx.sent(); len(sent) > 0 {
			t.Errorf("sent: %+v", sent)
		}
	})

	swaks := func(server string, args ...string) func(t *testing.T) {
		return func(t *testing.T) {
			m := newParcel("u0001@example.org")
			file := filepath.Join(newDir(t, "swaks"), "message")
			writeFile(t, file, stuffed(m.message())+".\r\n")
			argv := append([]string{"swaks", "--protocol", "LMTP", "--no-data-fixup", "--data", "@" + file,
				"--from", sender, "--to", m.rcpts[0], "--ehlo", "client.test", "--timeout", "20s"}, args...)
			if server != "" {
				host, port, _ := strings.Cut(server, ":")
				argv = append(argv, "--server", host, "--port", port)
			}
			if out, err := runTool(t, clientLimit, nil, argv...); err != nil {
				t.Fatalf("swaks: %v\n%s", err, out)
			}
			arrives(t, m)
		}
	}
	shown := []string{"--tls-cert", cert, "--tls-key", key, "--tls-ca-path", lab.ca.file, "--tls-verify"}
	t.Run("swaks/plain", swaks(p.lmtp()))
	t.Run("swaks/unix", swaks("", "--socket", socket))
	t.Run("swaks/starttls", swaks(p.host+":2402", append([]string{"--tls"}, shown...)...))
	t.Run("swaks/implicit", swaks(p.host+":2403", append([]string{"--tls-on-connect"}, shown...)...))

	t.Run("openssl", func(t *testing.T) {
		m := newParcel("u0001@example.org")
		c := openssl(t, door{"lmtp", "starttls", p.name, p.host + ":2402"}, "-cert", cert, "-key", key)
		c.lmtp(t, m)
		arrives(t, m)
		c = openssl(t, door{"lmtp", "implicit", p.name, p.host + ":2403"}, "-cert", cert, "-key", key)
		c.expect(t, `(?m)^220 `)
		m = newParcel("u0001@example.org")
		c.lmtp(t, m)
		arrives(t, m)

		openssl(t, door{"lmtp", "starttls", p.name, p.host + ":2402"}).ended(t)
		openssl(t, door{"lmtp", "implicit", p.name, p.host + ":2403"}).ended(t)
	})
	t.Run("without TLS", func(t *testing.T) {
		l := mustDialLMTP(t, p.host+":2402")
		r, err := l.command(lmtpLimit, "MAIL FROM:<%s>", sender)
		must(t, err)
		if r.code != 530 {
			t.Errorf("MAIL before STARTTLS, where a certificate is wanted: %v", r)
		}
		l = mustDialLMTP(t, p.host+":2401") // on loopback nobody listens in
		m := newParcel("u0001@example.org")
		said, err := l.deliver(sender, m.rcpts, m.message())
		must(t, err)
		if !said[0].accepted() {
			t.Errorf("without TLS on loopback: %v", said[0])
		}
		arrives(t, m)
	})
	mustHold(t, b, "u0001")
}

// lmtp types a whole session.
func (c *conversation) lmtp(t *testing.T, m *parcel) {
	t.Helper()
	c.say(t, "LHLO client.test")
	c.expect(t, `(?m)^250 .*\n`)
	c.say(t, "MAIL FROM:<%s>", sender)
	c.expect(t, `(?m)^250 2\.1\.0`)
	c.say(t, "RCPT TO:<%s>", m.rcpts[0])
	c.expect(t, `(?m)^250 2\.1\.5`)
	c.say(t, "DATA")
	c.expect(t, `(?m)^354 `)
	c.say(t, "%s.", stuffed(m.message()))
	c.expect(t, `(?m)^250 2\.`)
	c.say(t, "QUIT")
	c.expect(t, `(?m)^221 `)
	c.ended(t)
}
