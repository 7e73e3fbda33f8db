package proxy

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/posthouse/posthouse/proxy/splice"
)

// Metrics are the proxy's. They live in a registry of the caller's.
type Metrics struct {
	registry prometheus.Registerer
	logins   *prometheus.HistogramVec
	refusals *prometheus.CounterVec
	ends     *prometheus.CounterVec
	octets   *prometheus.CounterVec
}

// NewMetrics registers the proxy's metrics with r.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		registry: r,
		logins: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "posthouse_login_seconds", Help: "Successful logins by protocol: from credentials to the backend's yes, parking included.",
			Buckets: []float64{.002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 25, 60},
		}, []string{"protocol"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "posthouse_refusals_total", Help: "Answers that were no success, by protocol and reason.",
		}, []string{"protocol", "reason"}),
		ends: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "posthouse_session_ends_total", Help: "Ended backend sessions by protocol, cause, and whether the backend proved its end.",
		}, []string{"protocol", "cause", "proven"}),
		octets: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "posthouse_octets_total", Help: "Octets of ended sessions after login, by protocol and direction (up: to the backend).",
		}, []string{"protocol", "direction"}),
	}
	r.MustRegister(m.logins, m.refusals, m.ends, m.octets)
	return m
}

// watch adds the gauge of open connections: counted from the session list, so
// that it cannot drift.
func (m *Metrics) watch(s *Server) {
	for protocol := range s.protocols {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "posthouse_sessions", Help: "Open client connections by protocol.",
			ConstLabels: prometheus.Labels{"protocol": protocol},
		}, func() float64 {
			n := 0
			for _, l := range s.sessions.snapshot() {
				if l.Protocol == protocol {
					n++
				}
			}
			return float64(n)
		}))
	}
}

func (m *Metrics) loggedIn(protocol string, took time.Duration) {
	m.logins.WithLabelValues(protocol).Observe(took.Seconds())
}

func (m *Metrics) refused(protocol, reason string) {
	m.refusals.WithLabelValues(protocol, reason).Inc()
}

func (m *Metrics) ended(protocol string, r splice.Result) {
	m.ends.WithLabelValues(protocol, string(r.Cause), strconv.FormatBool(r.Proven)).Inc()
	m.octets.WithLabelValues(protocol, "up").Add(float64(r.Up))
	m.octets.WithLabelValues(protocol, "down").Add(float64(r.Down))
}
