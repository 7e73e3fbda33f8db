package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap/zapcore"

	"github.com/posthouse/posthouse/routing"
)

// narrator tells people what happens, one line each: the table's events, and
// of the log (it is a zapcore.Core) what they would want to see.
type narrator struct {
	out io.Writer
	// whenListening is called once, when clients and operators are served; it
	// may write to out.
	whenListening func()

	once sync.Once
	mu   sync.Mutex // one line at a time
}

// say prints one line with the time.
func (n *narrator) say(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	fmt.Fprintf(n.out, "%s  %s\n", time.Now().Format(time.TimeOnly), fmt.Sprintf(format, args...))
}

func (n *narrator) event(e routing.Event) {
	if text := tell(e); text != "" {
		n.say("%s", text)
	}
}

// Enabled is part of zapcore.Core, as are With, Check, Write and Sync.
func (n *narrator) Enabled(l zapcore.Level) bool { return l >= zapcore.InfoLevel }

func (n *narrator) With(fields []zapcore.Field) zapcore.Core { return &narratorWith{n, fields} }

func (n *narrator) Check(e zapcore.Entry, c *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if n.Enabled(e.Level) {
		return c.AddCore(e, n)
	}
	return c
}

func (n *narrator) Sync() error { return nil }

func (n *narrator) Write(e zapcore.Entry, fields []zapcore.Field) error {
	m := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(m)
	}
	of := m.Fields
	switch {
	case e.Message == "listening":
		n.once.Do(func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.whenListening()
		})
	case e.Message == "login":
		n.say("login    %v enters %v on %v, epoch %v", of["user"], of["role"], of["backend"], of["epoch"])
	case e.Message == "login refused":
		n.say("refused  a login of %v: %v", of["user"], of["reason"])
	case e.Message == "session ended" && of["proven"] == true && of["cause"] == "stay revoked":
		n.say("drained  %v has left %v, which has done all that it was asked", of["user"], of["backend"])
	case e.Message == "session ended":
		n.say("ended    %v has left %v: %v", of["user"], of["backend"], of["cause"])
	case e.Message == "stopping":
		n.say("stopping every session in good order")
	case e.Message == "stopped":
		n.say("stopped")
	case e.Level >= zapcore.WarnLevel:
		n.say("%-8s %s %s", e.Level, e.Message, pairs(of))
	}
	return nil
}

// pairs prints what is known, as key=value.
func pairs(of map[string]any) string {
	var list []string
	for key, value := range of {
		if value != "" {
			list = append(list, fmt.Sprintf("%s=%v", key, value))
		}
	}
	slices.Sort(list)
	return strings.Join(list, " ")
}

// narratorWith is a narrator that knows some fields already.
type narratorWith struct {
	*narrator
	fields []zapcore.Field
}

func (w *narratorWith) With(fields []zapcore.Field) zapcore.Core {
	return &narratorWith{w.narrator, slices.Concat(w.fields, fields)}
}

func (w *narratorWith) Check(e zapcore.Entry, c *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if w.Enabled(e.Level) {
		return c.AddCore(e, w)
	}
	return c
}

func (w *narratorWith) Write(e zapcore.Entry, fields []zapcore.Field) error {
	return w.narrator.Write(e, slices.Concat(w.fields, fields))
}
