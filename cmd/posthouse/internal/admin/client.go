package admin

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"

	"github.com/posthouse/posthouse/proxy"
	"github.com/posthouse/posthouse/routing"
)

const (
	// askTimeout bounds everything but what a switch, a plan or a rejoin takes.
	askTimeout = 30 * time.Second
	// maxLine bounds a line of Progress: a record, with a text that names a
	// few residues.
	maxLine = 1 << 20
)

// Client asks a running frontend.
type Client struct {
	socket string
	http   http.Client
}

// NewClient returns a client of the admin socket at the path. It connects when
// it is asked something.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	return &Client{socket, http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// Roles lists all roles.
func (c *Client) Roles(ctx context.Context) (list []Role, err error) {
	return list, c.get(ctx, "/v1/roles", &list)
}

// Sessions lists the frontend's connections, oldest first.
func (c *Client) Sessions(ctx context.Context) (list []proxy.SessionInfo, err error) {
	return list, c.get(ctx, "/v1/sessions", &list)
}

// Explain goes through the lookup of a user.
func (c *Client) Explain(ctx context.Context, user string) (x Explanation, err error) {
	return x, c.get(ctx, "/v1/explain?user="+url.QueryEscape(user), &x)
}

// Switch asks for a switch and blocks until its outcome is known or ctx ends;
// the switch goes on then. progress is told what happens. An aborted switch is
// an error and has a record.
func (c *Client) Switch(ctx context.Context, req SwitchRequest, progress func(Progress)) (*routing.SwitchRecord, error) {
	return c.stream(ctx, "/v1/switch", req, progress)
}

// Plan says what a switch would do, and changes nothing. It takes as long as the
// reports and the comparison of the members: a minute at most.
func (c *Client) Plan(ctx context.Context, req SwitchRequest) (p routing.Plan, err error) {
	return p, c.fetch(ctx, http.MethodPost, "/v1/switch/plan", req, &p)
}

// Failover is Switch when the active is dead.
func (c *Client) Failover(ctx context.Context, req FailoverRequest, progress func(Progress)) (*routing.SwitchRecord, error) {
	return c.stream(ctx, "/v1/failover", req, progress)
}

// Rejoin makes a stale member a copy of the active again. It takes as long as
// the hook; when ctx ends the hook is ended too.
func (c *Client) Rejoin(ctx context.Context, req RejoinRequest) (done routing.Rejoined, err error) {
	return done, c.fetch(ctx, http.MethodPost, "/v1/rejoin", req, &done)
}

// Abort turns a switch back; the undoing goes on when it returns.
func (c *Client) Abort(ctx context.Context, req SteerRequest) error {
	return c.call(ctx, http.MethodPost, "/v1/switch/abort", req, &struct{}{})
}

// Resume lets a switch go on that waits for the operator.
func (c *Client) Resume(ctx context.Context, req SteerRequest) error {
	return c.call(ctx, http.MethodPost, "/v1/switch/resume", req, &struct{}{})
}

// Switches lists those in progress and the last that have ended.
func (c *Client) Switches(ctx context.Context) (list Switches, err error) {
	return list, c.get(ctx, "/v1/switches", &list)
}

// Frontends lists the registered frontends.
func (c *Client) Frontends(ctx context.Context) (list []routing.FrontendStatus, err error) {
	return list, c.get(ctx, "/v1/frontends", &list)
}

// Fence ends the registration of a frontend that is down.
func (c *Client) Fence(ctx context.Context, req FenceRequest) error {
	return c.call(ctx, http.MethodPost, "/v1/frontends/fence", req, &struct{}{})
}

// InitRole is Switch for a role in doubt.
func (c *Client) InitRole(ctx context.Context, req InitRequest, progress func(Progress)) (*routing.SwitchRecord, error) {
	return c.stream(ctx, "/v1/roles/init", req, progress)
}

func (c *Client) get(ctx context.Context, path string, answer any) error {
	return c.call(ctx, http.MethodGet, path, nil, answer)
}

func (c *Client) call(ctx context.Context, method, path string, req, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return c.fetch(ctx, method, path, req, answer)
}

// fetch is call for what takes its time.
func (c *Client) fetch(ctx context.Context, method, path string, req, answer any) error {
	body, err := c.ask(ctx, method, path, req)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(answer); err != nil {
		return fmt.Errorf("the answer to %s on %s: %w", path, c.socket, err)
	}
	return nil
}

func (c *Client) stream(ctx context.Context, path string, req any, progress func(Progress)) (*routing.SwitchRecord, error) {
	body, err := c.ask(ctx, http.MethodPost, path, req)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	in := bufio.NewScanner(body)
	in.Buffer(nil, maxLine)
	for in.Scan() {
		var p Progress
		if err := json.Unmarshal(in.Bytes(), &p); err != nil {
			return nil, fmt.Errorf("the answer to %s on %s: %w", path, c.socket, err)
		}
		if !p.isLast() {
			progress(p)
			continue
		}
		if p.Error != nil {
			return p.Record, p.Error
		}
		return p.Record, nil
	}
	const advice = "the switch goes on; see `posthouse roles`"
	switch err := in.Err(); {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("no longer waiting: %s", advice)
	case err != nil:
		return nil, fmt.Errorf("the answer on %s broke off: %w: %s", c.socket, err, advice)
	}
	return nil, fmt.Errorf("posthouse on %s ended before the switch: %s", c.socket, advice)
}

// ask returns the body of a successful answer; the caller closes it.
func (c *Client) ask(ctx context.Context, method, path string, body any) (io.ReadCloser, error) {
	var content io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		content = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://posthouse"+path, content)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	e := new(Error)
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxLine)).Decode(e); err != nil || e.Text == "" {
		return nil, fmt.Errorf("%s answers %s: is it posthouse's socket?", c.socket, resp.Status)
	}
	return nil, e
}

// explain says what an operator can do about a socket that does not answer.
func (c *Client) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no posthouse is running with the socket %s: start it with `posthouse serve -c FILE`, or name the right one by -c FILE or --socket PATH", c.socket)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("this user may not use the socket %s: try as root or as the user that posthouse runs as", c.socket)
	case errors.Is(err, context.Canceled):
		return errors.New("interrupted")
	}
	var inner *url.Error
	if errors.As(err, &inner) {
		err = inner.Err
	}
	return fmt.Errorf("asking posthouse on %s: %w", c.socket, err)
}
