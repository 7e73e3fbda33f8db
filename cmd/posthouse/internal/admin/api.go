// Package admin is the operator's access to a running frontend: HTTP and JSON
// on a unix socket, its client, and the health page.
//
//	GET  /v1/version              {"version": "…"}
//	GET  /v1/roles                []Role
//	POST /v1/roles/init           InitRequest → lines of Progress
//	POST /v1/switch               SwitchRequest → lines of Progress
//	POST /v1/switch/plan          SwitchRequest → routing.Plan
//	POST /v1/switch/abort         SteerRequest → {}
//	POST /v1/switch/resume        SteerRequest → {}
//	POST /v1/failover             FailoverRequest → lines of Progress
//	POST /v1/rejoin               RejoinRequest → routing.Rejoined
//	GET  /v1/switches             Switches
//	GET  /v1/frontends            []routing.FrontendStatus
//	POST /v1/frontends/fence      FenceRequest → {}
//	GET  /v1/explain?user=NAME    Explanation
//	GET  /v1/sessions             []proxy.SessionInfo
//
// Whatever fails is answered by an Error. The answer to a switch begins when
// the role is held: a switch that is refused before has a status of its own.
package admin

import (
	"fmt"
	"net/http"

	"github.com/posthouse/posthouse/proxy"
	"github.com/posthouse/posthouse/routing"
)

// Source is what the API shows and changes. All of it outlives the handler.
type Source struct {
	Table    *routing.Table
	Sessions func() []proxy.SessionInfo
	Version  string
	// Names returns the names under which the directory is asked for what an
	// operator typed, a login name or the address of a recipient, the first
	// first; at least one, or an error.
	Names func(typed string) ([]string, error)
}

// Role is one role as the frontend that was asked sees it.
type Role struct {
	routing.RoleStatus
	// InDoubt: the store went back; Doubt says how.
	InDoubt bool `json:"in_doubt"`
}

// Explanation is every step of a user's lookup.
type Explanation struct {
	routing.Explanation
	// Addresses of the backend, by service.
	Addresses map[string]string `json:"addresses,omitempty"`
}

// SwitchRequest asks for another active. Role and To are needed.
type SwitchRequest struct {
	Role string `json:"role"`
	To   string `json:"to"`
	// Who and Reason go into the role's history. Who is the caller's word:
	// the socket's permissions decide who may call.
	Who    string `json:"who,omitempty"`
	Reason string `json:"reason,omitempty"`
	// ConfirmedClean: nothing of the past runs on the role's backends any
	// more; it clears the residues recorded so far.
	ConfirmedClean bool `json:"confirmed_clean,omitempty"`
	// AcceptRefusals: begin though some logins would find no place to wait.
	AcceptRefusals bool `json:"accept_refusals,omitempty"`
}

func (r SwitchRequest) routing() routing.SwitchRequest {
	return routing.SwitchRequest{Role: r.Role, To: r.To, Who: r.Who, Why: r.Reason,
		ConfirmedClean: r.ConfirmedClean, AcceptRefusals: r.AcceptRefusals}
}

// FailoverRequest asks for another active because the present one is dead. Role
// and To are needed; Who and Reason are a SwitchRequest's.
type FailoverRequest struct {
	Role   string `json:"role"`
	To     string `json:"to"`
	Who    string `json:"who,omitempty"`
	Reason string `json:"reason,omitempty"`
	// AcceptLoss: without proof that the old active is off.
	AcceptLoss bool `json:"accept_loss,omitempty"`
	// AcceptStale: To may be stale; what the active took since is lost.
	AcceptStale bool `json:"accept_stale,omitempty"`
	// ConfirmedClean is a SwitchRequest's.
	ConfirmedClean bool `json:"confirmed_clean,omitempty"`
}

// RejoinRequest makes a stale member a copy of the active again.
type RejoinRequest struct {
	Role   string `json:"role"`
	Member string `json:"member"`
	Who    string `json:"who,omitempty"`
	Reason string `json:"reason,omitempty"`
}

// SteerRequest aborts or resumes the switch of a role. Role is needed; Who and
// Reason are a SwitchRequest's.
type SteerRequest struct {
	Role   string `json:"role"`
	Who    string `json:"who,omitempty"`
	Reason string `json:"reason,omitempty"`
	// ConfirmedDown, of an abort: the new active is down, and stays down.
	ConfirmedDown bool `json:"confirmed_down,omitempty"`
}

// Switches are those in progress and the last that have ended, oldest first.
type Switches struct {
	Open  []routing.SwitchRecord `json:"open"`
	Ended []routing.SwitchRecord `json:"ended"`
}

// FenceRequest is the operator's word that a frontend is down and stays down.
type FenceRequest struct {
	Frontend      string `json:"frontend"`
	ConfirmedDown bool   `json:"confirmed_down"`
	Who           string `json:"who,omitempty"`
	Reason        string `json:"reason,omitempty"`
}

// InitRequest decides who serves a role that is in doubt, or not in the table.
// Role and Active are needed.
type InitRequest struct {
	Role   string `json:"role"`
	Active string `json:"active"`
	Who    string `json:"who,omitempty"`
	Reason string `json:"reason,omitempty"`
	// ConfirmedClean is a SwitchRequest's.
	ConfirmedClean bool `json:"confirmed_clean,omitempty"`
	// AcceptStale: Active may be stale.
	AcceptStale bool `json:"accept_stale,omitempty"`
}

// Progress is one line of the answer to a switch. The last line has Record,
// Error or (a switch that was aborted) both; the others have one of Event and
// Waiting.
type Progress struct {
	Event *routing.Event `json:"event,omitempty"`
	// Waiting says what the switch waits for, each time that this changes.
	Waiting string                `json:"waiting,omitempty"`
	Record  *routing.SwitchRecord `json:"record,omitempty"`
	Error   *Error                `json:"error,omitempty"`
}

func (p Progress) isLast() bool { return p.Record != nil || p.Error != nil }

// Code says what kind of failure an Error is.
type Code string

const (
	CodeBadRequest  Code = "bad_request" // not understood
	CodeTooLarge    Code = "too_large"
	CodeNotFound    Code = "not_found" // no such path
	CodeMethod      Code = "method_not_allowed"
	CodeConflict    Code = "conflict"    // the role table's rules do not allow it
	CodeAborted     Code = "aborted"     // the switch began and was turned back
	CodeInterrupted Code = "interrupted" // the switch goes on, and nobody here sees its end
	CodeInternal    Code = "internal"
)

// status is the HTTP status of a failure.
func (c Code) status() int {
	switch c {
	case CodeBadRequest:
		return http.StatusBadRequest
	case CodeTooLarge:
		return http.StatusRequestEntityTooLarge
	case CodeNotFound:
		return http.StatusNotFound
	case CodeMethod:
		return http.StatusMethodNotAllowed
	case CodeConflict, CodeAborted:
		return http.StatusConflict
	case CodeInterrupted:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// Error is a failure as the API tells it.
type Error struct {
	Text string `json:"error"`
	Code Code   `json:"code"`
}

// Error returns what failed and what to do.
func (e *Error) Error() string { return e.Text }

func errorf(code Code, format string, args ...any) *Error {
	return &Error{Text: fmt.Sprintf(format, args...), Code: code}
}
