package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/posthouse/posthouse/routing"
)

// lookEvery is how often a switch looks for what it waits for.
const lookEvery = 500 * time.Millisecond

// outcome is how a switch ended for who waited for it.
type outcome struct {
	rec routing.SwitchRecord
	err error
}

// stream runs a switch of role and answers with its progress, a line each. If
// the client goes away the switch goes on.
func (h *handler) stream(w http.ResponseWriter, r *http.Request, role string,
	run func(context.Context, func(routing.Event)) (routing.SwitchRecord, error),
) {
	ctx := r.Context()
	events := make(chan routing.Event)
	ended := make(chan outcome, 1)
	go func() {
		rec, err := run(ctx, func(e routing.Event) {
			select {
			case events <- e:
			case <-ctx.Done():
			}
		})
		ended <- outcome{rec, err}
	}()
	out := lines{w: w}
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	waiting := ""
	for {
		select {
		case e := <-events:
			out.write(Progress{Event: &e})
		case <-look.C:
			if now := h.waitsFor(role); now != "" && now != waiting {
				waiting = now
				out.write(Progress{Waiting: now})
			}
		case o := <-ended:
			out.end(o)
			return
		}
	}
}

// waitsFor says what keeps a held role, with those that are switched with it, from
// opening; "" if nothing is known.
func (h *handler) waitsFor(role string) string {
	switched := h.Table.Switched(role)
	if len(switched) == 0 {
		return ""
	}
	var parts, missing []string
	if phase := switched[0].Phase; phase != routing.PhaseHold {
		parts = append(parts, "phase "+string(phase))
	}
	below, residues := 0, 0
	for _, with := range switched {
		missing = append(missing, with.Missing...)
		below += with.Below
		residues += len(with.Residues) + len(with.Unhanded)
	}
	slices.Sort(missing)
	if missing = slices.Compact(missing); len(missing) > 0 {
		parts = append(parts, "the ack of frontend "+strings.Join(missing, ", "))
	}
	if below > 0 {
		parts = append(parts, fmt.Sprintf("the end of sessions here: %d", below))
	}
	if residues > 0 {
		parts = append(parts, fmt.Sprintf("residues: %d, until they age out, or a hook or --confirmed-clean clears them", residues))
	}
	return strings.Join(parts, "; ")
}

// lines writes an answer line by line. The first one sends the status.
type lines struct {
	w     http.ResponseWriter
	begun bool
}

func (l *lines) write(p Progress) {
	rc := http.NewResponseController(l.w)
	_ = rc.SetWriteDeadline(time.Now().Add(ioTimeout))
	if !l.begun {
		l.begun = true
		l.w.Header().Set("Content-Type", "application/x-ndjson")
	}
	// If the client is gone, ctx ends and with it the waiting.
	_ = json.NewEncoder(l.w).Encode(p)
	_ = rc.Flush()
}

// end writes the last line. A refusal before anything happened has its own
// status instead.
func (l *lines) end(o outcome) {
	var last Progress
	if o.rec.Number != 0 {
		last.Record = &o.rec
	}
	if o.err != nil {
		last.Error = errorOf(o.err, o.rec)
	}
	if last.Record == nil && !l.begun {
		fail(l.w, last.Error)
		return
	}
	l.write(last)
}
