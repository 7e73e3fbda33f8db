package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapserver"
	"github.com/emersion/go-imap/v2/imapserver/imapmemserver"
)

// demoServers are the demo's backends, in the order of demoBackends: servers
// of their own over the same mailboxes, as replicas that are never behind.
type demoServers struct {
	servers   []*imapserver.Server
	listeners []net.Listener
	running   sync.WaitGroup
}

// startDemoBackends serves on free ports of loopback until close. A session's
// end takes linger.
func startDemoBackends(ctx context.Context, linger time.Duration) (*demoServers, error) {
	mail := imapmemserver.New()
	for _, name := range demoUsers {
		user, err := demoMailbox(name)
		if err != nil {
			return nil, err
		}
		mail.AddUser(user)
	}
	d := new(demoServers)
	for range demoBackends {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			d.close()
			return nil, err
		}
		s := imapserver.New(&imapserver.Options{
			NewSession: func(*imapserver.Conn) (imapserver.Session, *imapserver.GreetingData, error) {
				return mail.NewSession(), nil, nil
			},
			Caps:         imap.CapSet{imap.CapIMAP4rev1: {}, imap.CapIMAP4rev2: {}},
			InsecureAuth: true,                       // on loopback, from this process
			Logger:       log.New(io.Discard, "", 0), // a client that goes away is nothing to tell
		})
		d.servers, d.listeners = append(d.servers, s), append(d.listeners, l)
		d.running.Go(func() { _ = s.Serve(unhurried{l, linger}) })
	}
	return d, nil
}

func (d *demoServers) close() {
	for _, s := range d.servers {
		_ = s.Close()
	}
	d.running.Wait()
}

// unhurried is the listener of a backend that has something to finish when a
// session ends, as real ones do: without it nobody could watch a hold.
type unhurried struct {
	net.Listener
	linger time.Duration
}

func (l unhurried) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &unhurriedConn{Conn: conn, linger: l.linger, closed: make(chan struct{})}, nil
}

// unhurriedConn waits before it lets a BYE out.
type unhurriedConn struct {
	net.Conn
	linger time.Duration
	once   sync.Once
	closed chan struct{}
}

func (c *unhurriedConn) Write(p []byte) (int, error) {
	if bytes.HasPrefix(p, []byte("* BYE ")) {
		select {
		case <-time.After(c.linger):
		case <-c.closed:
		}
	}
	return c.Conn.Write(p)
}

func (c *unhurriedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// demoMailbox is a user with a little mail.
func demoMailbox(name string) (*imapmemserver.User, error) {
	u := imapmemserver.NewUser(name, demoPassword)
	for _, mailbox := range []string{"INBOX", "Sent"} {
		if err := u.Create(mailbox, nil); err != nil {
			return nil, err
		}
	}
	written := time.Now().Add(-time.Hour).Truncate(time.Second)
	for n, m := range []struct{ subject, text string }{
		{"Welcome to the posthouse", "The coach stops here only to change its horses."},
		{"Try a switch", "Stay logged in, and switch the role from another terminal: this mail will still be here."},
		{"Nothing is lost", "The old backend says that it is done before the new one opens."},
	} {
		at := written.Add(time.Duration(n) * time.Minute)
		message := fmt.Sprintf("Date: %s\r\nFrom: Postmaster <postmaster@example.org>\r\nTo: %s@example.org\r\n"+
			"Subject: %s\r\nMessage-ID: <%d.%s@example.org>\r\n\r\n%s\r\n", at.Format(time.RFC1123Z), name, m.subject, n+1, name, m.text)
		r := literal{strings.NewReader(message)}
		if _, err := u.Append("INBOX", r, &imap.AppendOptions{Time: at}); err != nil {
			return nil, err
		}
	}
	return u, nil
}

// literal is a message as imapmemserver takes it.
type literal struct{ *strings.Reader }

func (l literal) Size() int64 { return l.Reader.Size() }
