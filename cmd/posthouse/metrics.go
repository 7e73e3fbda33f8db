package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/posthouse/posthouse/routing"
)

// metrics are those of the role table. Every frontend counts every switch, once
// for all its roles.
type metrics struct {
	switches *prometheus.CounterVec
	phases   *prometheus.HistogramVec
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		switches: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "posthouse_switches_total", Help: "Switches that have ended, by result: opened or aborted (also those that were refused).",
		}, []string{"result"}),
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "posthouse_switch_phase_seconds", Help: "How long each phase of a switch took; preflight has the comparison, hold the acks.",
			Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20, 60, 600, 3600},
		}, []string{"phase"}),
	}
	for _, result := range []string{"opened", "aborted"} {
		m.switches.WithLabelValues(result)
	}
	r.MustRegister(m.switches, m.phases)
	return m
}

// countSwitches returns an OnEvent that counts, and passes events on to next,
// which may be nil.
func (m *metrics) countSwitches(next func(routing.Event)) func(routing.Event) {
	return func(e routing.Event) {
		if len(e.Steps) > 0 { // once for all roles of a switch
			m.switches.WithLabelValues(string(e.Kind)).Inc()
			for n := range len(e.Steps) - 1 {
				m.phases.WithLabelValues(string(e.Steps[n].Phase)).Observe(e.Steps[n+1].At.Sub(e.Steps[n].At).Seconds())
			}
		}
		if next != nil {
			next(e)
		}
	}
}

// watchTable adds the table's metrics.
func (i *instance) watchTable() {
	gauge := func(name, help string, value func(routing.Counters) float64) {
		i.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help},
			func() float64 { return value(i.table.Counters()) }))
	}
	gauge("posthouse_stays", "Sessions inside roles, on their way to or on a backend.",
		func(c routing.Counters) float64 { return float64(c.Inside) })
	gauge("posthouse_parked", "Logins that wait for a role on hold.",
		func(c routing.Counters) float64 { return float64(c.Parked) })
	i.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "posthouse_role_disagreements_total",
		Help: "Logins whose directory names another role than the one last used here.",
	}, func() float64 { return float64(i.table.Counters().Disagreements) }))
}
